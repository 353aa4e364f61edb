"""Extracts what was trained from a checkpoint of this project."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from lightning_pipelite import adapters
from lightning_pipelite.adapters import Adapter
from lightning_pipelite.checkpoint import read_checkpoint
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.atomic_output import new_directory
from lightning_pipelite.export.checkpoint_place import of_option
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.fingerprint import fingerprint
from lightning_pipelite.shared.progress import track

CPU = torch.device("cpu")
# Options on loading the base that saving needs as well. FP8 is not among them, as it changes no adapter.
LOADING = ("load_in_4bit", "bnb_4bit_use_double_quant", "allow_pickled_weights", "trust_remote_code")


def convert_own(
    checkpoint: Path, output: Path, config: Mapping[str, Any] | None, *, allow_another_base: bool = False
) -> str:
    """Save the trained weights of ``checkpoint`` as the training itself would have.

    Each decoder layer is built as a stage of its own, filled with the checkpoint's values, and saved: adapters see
    what they saw in training, and only one layer is in memory at a time.

    Args:
        checkpoint: Directory of the checkpoint.
        output: Directory to write.
        config: Options of the training, by section; by default, those that the checkpoint records.
        allow_another_base: Accept a model other than the one that was trained on.

    Raises:
        ConfigurationError: This is not a checkpoint, is damaged, or does not fit the configuration.
    """
    try:
        meta, parameters = read_checkpoint(checkpoint)
    except ConfigurationError as error:
        raise of_option(error, checkpoint) from None
    values = dict(parameters)
    settings = _said_by(meta, checkpoint) if config is None else _checked(config, "the configuration")
    model_dir = Path(settings["model"]["model_dir"])
    with new_directory(output, [checkpoint, model_dir]):  # only a check; the adapter writes it atomically
        pass
    output.rmdir()
    trained_on = meta.get("identity", {}).get("base_model")
    if not allow_another_base and trained_on is not None and trained_on != fingerprint(model_dir):
        raise ConfigurationError(
            f"{checkpoint} was trained on another base than {model_dir}; give a configuration whose model.model_dir "
            "is the right one, or set allow_another_base to true."
        )
    adapter = _adapter(settings["model"]["adapter"], checkpoint if config is None else "the configuration")
    loading: dict[str, Any] = {key: bool(settings["model"].get(key)) for key in LOADING}
    loading["bnb_4bit_use_double_quant"] &= loading["load_in_4bit"]  # older versions ignored it without the other
    layers = CausalLMLayers(
        model_dir,
        dtype=getattr(torch, settings["model"].get("dtype", "bfloat16")),
        **loading,
        adapter=adapter,
        activation_memory="keep",
        seed=int(settings.get("seed_everything") or 0),
        packed=False,
    )
    unused = set(values)

    def states() -> Iterator[dict[str, Tensor]]:
        for number in track(range(len(layers)), "converting", "layers"):
            stage = layers.build_stage(number, number + 1, CPU)
            for name, parameter in stage.named_parameters():
                if parameter.requires_grad:
                    if name not in values or values[name].shape != parameter.shape:
                        raise ConfigurationError(
                            f"{checkpoint} has no {name} of shape {list(parameter.shape)}; give the configuration "
                            "that it was trained with."
                        )
                    parameter.data.copy_(values[name])
                    unused.discard(name)
            yield layers.trained_state(stage)
        if unused:
            raise ConfigurationError(
                f"{checkpoint} holds {min(unused)}, which this configuration does not train; give the configuration "
                "that it was trained with."
            )

    adapter.save(output, states(), layers.meta_model)
    return f"{output}: {type(adapter).__name__} from step {meta['step']}."


def _said_by(meta: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        identity, model_dir = meta["identity"], meta["hyper_parameters"]["model_dir"]
        own = {f"{getattr(adapters, name).__module__}.{name}" for name in adapters.__all__}
        if identity["adapter"]["class_path"] not in own:  # otherwise reading a checkpoint could run arbitrary code
            raise TypeError(f"adapter {identity['adapter']['class_path']}")
        model = {"model_dir": str(model_dir), "adapter": identity["adapter"], "dtype": identity["dtype"]}
        model |= {key: meta["hyper_parameters"].get(key, identity.get(key)) for key in LOADING}
    except (LookupError, TypeError) as error:
        raise ConfigurationError(
            f"{checkpoint} does not record what was trained ({error}); give the YAML of the training as config."
        ) from None
    return {"model": model}


def read_settings(path: Path) -> dict[str, Any]:
    """Read the options of a training from its YAML file.

    Raises:
        ConfigurationError: If the file does not say what was trained.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); give the YAML of the training.") from None
    return _checked(content, str(path))


def _checked(settings: Any, source: str) -> dict[str, Any]:
    try:
        if not isinstance(settings["model"]["model_dir"], str) or not isinstance(settings["model"]["adapter"], dict):
            raise TypeError("wrong type")
    except (LookupError, TypeError) as error:
        raise ConfigurationError(
            f"{source} has no valid model.model_dir and model.adapter ({error}); give the YAML of the training."
        ) from None
    return dict(settings)


def _adapter(settings: dict[str, Any], source: Path | str) -> Adapter:
    module, _, name = str(settings.get("class_path")).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        adapter = kind(**settings.get("init_args") or {})
    except (ImportError, ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{source}: model.adapter cannot be created ({error}).") from None
    if not isinstance(adapter, Adapter):
        raise ConfigurationError(f"{source}: model.adapter is a {name}, which is not an adapter of this project.")
    return adapter
