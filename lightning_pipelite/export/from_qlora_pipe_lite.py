"""Extracts what was trained from DeepSpeed checkpoints of qlora-pipe-lite."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from lightning_pipelite.adapters.config_file import CONFIG_FILE, CONTROL_ADAPTER
from lightning_pipelite.adapters.control_files import ControlAdapterFile
from lightning_pipelite.adapters.weight_file import WEIGHTS_FILE
from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.export.atomic_output import new_directory
from lightning_pipelite.export.base import BaseModel
from lightning_pipelite.export.checkpoint_place import FORMER_FILE, latest
from lightning_pipelite.export.lora_files import PREFIX, LoRAOfBase
from lightning_pipelite.export.merging import write_model
from lightning_pipelite.export.migration import Migration
from lightning_pipelite.models.fingerprint import fingerprint, record_base
from lightning_pipelite.shared.progress import track
from lightning_pipelite.shared.wording import counted

BEFORE_LAYERS = 2  # pipeline items before the decoder layers: input preparation and embedding


class FormerCheckpoint:
    """A checkpoint of qlora-pipe-lite: one file per pipeline item, loaded without running code from it.

    The items are the input preparation, the embedding, the decoder layers, the final norm, the head and the loss.

    Args:
        directory: Directory of the files, or of a run with a file ``latest``.
        config: TOML file of the training.

    Raises:
        ConfigurationError: The files or the configuration are missing, damaged, or do not fit each other.
    """

    def __init__(self, directory: Path, config: Path) -> None:
        self.directory = latest(directory)
        self.config = config
        settings = Migration(config).content
        self._model_dir = Path(settings["model"]["model_dir"])
        self._adapter: dict[str, Any] = settings["model"]["adapter"]
        self._files = {
            int(match[1]): path
            for path in sorted(self.directory.iterdir())
            if (match := FORMER_FILE.fullmatch(path.name)) is not None
        }

    def convert(self, output: Path) -> str:
        """Write ``output``: a PEFT directory, or a whole model."""
        kind = self._adapter["class_path"].rpartition(".")[2]
        with new_directory(output, [self.directory, self._model_dir]) as partial:
            base = BaseModel(self._model_dir)
            if kind == "Full":
                count = self._write_model(base, partial)
                return f"{output}: {count} trained weights in place of those of {self._model_dir}."
            tensors = dict(self._adapter_tensors(base))
            if not tensors:
                raise ConfigurationError(f"{self.directory} holds no adapter; give the configuration of its training.")
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            record_base(partial, fingerprint(base.directory))
            if kind == "ControlAdapter":
                self._write_control_config(partial)
                ControlAdapterFile(partial)
                return f"{output}: Control Adapter, {counted(len(tensors), 'tensor')}."
            told = self._write_lora_config(base, partial, tensors)
            LoRAOfBase(base, partial)
            return f"{output}: LoRA, {counted(len(tensors), 'tensor')}, {told}."

    def _adapter_tensors(self, base: BaseModel) -> Iterator[tuple[str, Tensor]]:
        for number, path in track(self._files.items(), "converting", "files"):
            layer = number - BEFORE_LAYERS
            for key, tensor in _load(path).items():
                name = key.removeprefix("orig.")
                if ".lora_" in name or re.match(r"control_[QSAB]\b", name):
                    if not 0 <= layer < base.config.num_hidden_layers:
                        raise ConfigurationError(f"{path} holds {key}, but there is no decoder layer {layer}.")
                    name = name.replace(".default", "")
                    yield PREFIX + base.whole.name(f"model.layers.{layer}.{name}"), tensor.clone().contiguous()

    def _write_lora_config(self, base: BaseModel, directory: Path, tensors: dict[str, Tensor]) -> str:
        options = self._adapter["init_args"]
        rank = options["rank"]
        alpha = self._alpha() or rank
        suffixes = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in tensors}
        modules = {key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in tensors}
        layers = {int(re.findall(r"\.layers\.(\d+)\.", key)[0]) for key in tensors}
        # A multimodal model may have other modules with the same names.
        whole = len(modules) == len(suffixes) * len(layers) and not base.is_text_part
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=options["dropout"],
            target_modules=sorted(suffixes) if whole else sorted(modules),
            layers_to_transform=sorted(layers) if whole else None,
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(self._model_dir.absolute()),
            inference_mode=True,
        )
        config.save_pretrained(str(directory))
        if self._alpha() is None:
            return f"alpha = rank = {rank}, as the configuration has no lora_alpha (early versions then used √rank)"
        return f"alpha = {alpha}"

    def _alpha(self) -> float | None:
        match = re.search(r"^\s*lora_alpha\s*=\s*([\d.]+)", self.config.read_text(encoding="utf-8"), re.MULTILINE)
        return None if match is None else float(match[1])

    def _write_control_config(self, directory: Path) -> None:
        options = self._adapter["init_args"]
        config = {
            "peft_type": CONTROL_ADAPTER,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self._model_dir.absolute()),
            "r": options["rank"],
            "control_dropout": options["dropout"],
            "control_gamma": options["gamma"],
            "layers_to_transform": options.get("layers_to_transform"),
            "inference_mode": True,
        }
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _write_model(self, base: BaseModel, directory: Path) -> int:
        """Write the base with the trained weights in place of its own."""
        trained = _Trained(base, self._files)
        write_model(base, directory, trained, "converting")
        return len(trained)


class _Trained:
    """The trained weights by their names in the base's files; one checkpoint file is loaded at a time."""

    def __init__(self, base: BaseModel, files: dict[int, Path]) -> None:
        self._where: dict[str, tuple[Path, str]] = {}
        self._loaded: tuple[Path | None, dict[str, Tensor]] = (None, {})
        held = {tensor: entry for header in base.headers.values() for tensor, entry in header.items()}
        last = BEFORE_LAYERS + base.config.num_hidden_layers
        outside = {1: "model.embed_tokens.", last: "model.norm.", last + 1: "lm_head."}
        for number, path in files.items():
            prefix = outside.get(number, f"model.layers.{number - BEFORE_LAYERS}.")
            for key, tensor in _load(path).items():
                name = prefix + key.removeprefix("orig.").removeprefix("lm_head.")
                if name == "lm_head.weight" and base.config.tie_word_embeddings:
                    continue  # tied to the embedding
                if base.is_text_part and name in base.groups:  # the files use another name
                    (name,) = base.groups[name].files
                if name not in held or held[name]["shape"] != list(tensor.shape):
                    raise ConfigurationError(
                        f"{path} holds {key} with shape {list(tensor.shape)}, but {base.directory} has no {name} of "
                        "that shape; give the configuration of its training."
                    )
                self._where[name] = (path, key)
        if not self._where:
            raise ConfigurationError("the checkpoint holds no trained weights; give the configuration of its training.")

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._where[name]
        if self._loaded[0] != path:
            self._loaded = (path, _load(path))
        return self._loaded[1][key]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as plain weights ({first_line(error)}); copy it again."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigurationError(f"{path} holds something other than weights; give a checkpoint of qlora-pipe-lite.")
    return state
