"""Trains the model's own weights."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from glob import escape
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pipelite.adapters.base import Adapter, to_cpu
from lightning_pipelite.adapters.directory import whole_directory
from lightning_pipelite.adapters.left_out import left_out_weights
from lightning_pipelite.adapters.selection import match_modules, parse_layers
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.companions import PLAIN, companions, copy_to
from lightning_pipelite.models.config import read_config
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.stored.known import unquantised
from lightning_pipelite.models.text_part import TEXT_MODEL_NAMES
from lightning_pipelite.models.transformers_compat import revert_weight_conversion
from lightning_pipelite.models.weight_files import INDEX_FILE, read_json, weight_files

KNOWN_FILES = ("config.json", "*.safetensors", INDEX_FILE, "README.md", *PLAIN)


class Full(Adapter):
    """Trains the model's own weights, all or those of the chosen modules.

    Args:
        target_modules: Modules whose weights are trained: a list of names such as "self_attn" or "embed_tokens", or a
            regular expression for the full name; all by default.
        layers_to_transform: Train only these decoder layers, such as "0:3, 7, 12:15" (ranges are inclusive) or a list
            of numbers; embedding, final norm and head are then frozen. All by default.
    """

    def __init__(
        self, target_modules: str | list[str] | None = None, layers_to_transform: str | list[int] | None = None
    ) -> None:
        self.target_modules = target_modules
        self.layers_to_transform = layers_to_transform

    @property
    @override
    def changes_weights(self) -> str:
        return "Full"

    @override
    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        if load_in_4bit:
            raise ConfigurationError(
                "load_in_4bit cannot be used with Full: 4-bit weights cannot be trained; use LoRA."
            )
        if meta_model.is_text_part and meta_model.key_mapping is None and _is_pickled(meta_model.model_dir):
            raise ConfigurationError(
                f"{meta_model.model_dir} has pickled weights (.bin) only, from which the image or audio part cannot be "
                "copied when the trained model is saved; save the model with transformers' save_pretrained, which "
                "writes safetensors, and use that."
            )
        self._trained(meta_model)

    @override
    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        trained = self._trained(meta_model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

    @override
    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())  # a tied weight once, under the embedding's name
        aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
        # transformers renames and fuses weights on loading; its own inverse restores the names in the files.
        on_disk = revert_weight_conversion(model, state)
        return {name: to_cpu(tensor) for name, tensor in on_disk.items()}

    @override
    def place(self, directory: Path, meta_model: MetaModel) -> AbstractContextManager[Path]:
        if directory.resolve() == meta_model.model_dir.resolve():
            raise ConfigurationError(f"{directory} is the model being trained; choose another place to save to.")
        copied = {path.parts[0] for path in companions(meta_model.model_dir)}
        return whole_directory(directory, [*KNOWN_FILES, *map(escape, copied)])

    @override
    def write(self, directory: Path, states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> None:
        config = _config(meta_model)
        copy_to(directory, meta_model.model_dir, companions(meta_model.model_dir))
        if meta_model.key_mapping is not None:
            states = map(_as_text_model, states)
        elif meta_model.is_text_part:  # saved as part of the whole model
            states = itertools.chain(states, left_out_weights(meta_model))
        shards, dtype = _write_shards(directory, states)
        _write_index(directory, shards)
        config["dtype"] = dtype
        config.pop("torch_dtype", None)  # the older name of the same key
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _trained(self, meta_model: MetaModel) -> set[str]:
        """Return the names of the trained parameters of the whole model, a tied one under the embedding's name."""
        modules = {name: module for name, module in meta_model.model.named_modules() if name}
        trained = {id(parameter) for parameter in meta_model.model.parameters()}
        if self.target_modules is not None:
            matched = match_modules(modules, self.target_modules)
            trained = {id(parameter) for name in matched for parameter in modules[name].parameters()}
        names = {name for name, parameter in meta_model.model.named_parameters() if id(parameter) in trained}
        if self.layers_to_transform is not None:
            layers = set(parse_layers(self.layers_to_transform, len(meta_model.layers)))
            names = {name for name in names if meta_model.layer_of(name) in layers}
        if not names:
            raise ConfigurationError("target_modules matches no weight in layers_to_transform; widen one of the two.")
        return names


def _config(meta_model: MetaModel) -> dict[str, Any]:
    """Return the configuration to save, unquantised; for a text model that is saved on its own, the text model's."""
    if meta_model.key_mapping is None:
        return unquantised(read_json(meta_model.model_dir / "config.json"))
    text, _ = read_config(meta_model.model_dir, meta_model.trust_remote_code)
    return {**text.to_dict(), "architectures": [type(meta_model.model).__name__], "use_cache": True}


def _is_pickled(model_dir: Path) -> bool:
    return not weight_files(model_dir) and any(model_dir.glob("*.bin"))


def _as_text_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a text model's weights from their names in a multimodal checkpoint to its own."""
    named = {}
    for name, tensor in state.items():
        for pattern, own in TEXT_MODEL_NAMES.items():
            name = re.sub(pattern, own, name)
        named[name] = tensor
    return named


def _write_shards(directory: Path, states: Iterable[dict[str, Tensor]]) -> tuple[list[dict[str, int]], str | None]:
    """Write one shard per stage; return the bytes of each shard's tensors by name, and the dtype of most bytes."""
    shards: list[dict[str, int]] = []
    by_dtype: dict[str, int] = {}
    written: set[str] = set()
    for number, state in enumerate(states, start=1):
        # The first and the last stage both hold a tied weight: whichever comes first writes it.
        state = {name: tensor for name, tensor in state.items() if name not in written}
        written |= state.keys()
        save_file(state, directory / f"{number}.safetensors", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in state.items()})
        for tensor in state.values():
            dtype = str(tensor.dtype).removeprefix("torch.")
            by_dtype[dtype] = by_dtype.get(dtype, 0) + tensor.nbytes
    return shards, max(by_dtype, key=lambda dtype: by_dtype[dtype], default=None)


def _write_index(directory: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards their final names, which contain the number of shards, and write their index."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.safetensors").rename(directory / final)
        weight_map.update(dict.fromkeys(shard, final))
    total = sum(size for shard in shards for size in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
