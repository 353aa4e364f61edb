"""Loads the trained weights of a checkpoint into a module, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_pipelite.checkpoint.encoding import decode
from lightning_pipelite.checkpoint.reader import check_whole, located, trainer_state
from lightning_pipelite.checkpoint.stage_state import load_parameters, state_names
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.layers import SequentialLayers, hand_out_layers
from lightning_pipelite.strategy.outside_layers import load_outside_layers

Module = TypeVar("Module", bound=nn.Module)


def load_trained(module: Module, directory: str | Path, strict: bool = True) -> Module:
    """Load the trained parameters and the buffers of a checkpoint, whatever its number of stages.

    The module's tensors outside its layers are loaded too; the rest of the checkpoint, such as the optimizer's state,
    is ignored.

    Args:
        module: The module, created as for the training, with a method ``pipeline_layers()`` that returns a list of
            layers.
        directory: The checkpoint.
        strict: Whether the checkpoint must have all of the module's trained parameters, and no others.

    Returns:
        The module.

    Raises:
        ConfigurationError: If the checkpoint is incomplete, or one of another model.
    """
    path = located(Path(directory))
    meta = check_whole(path)
    load_state(module, path, meta, decode(*trainer_state(path)).get("state_dict", {}), strict)
    return module


def load_state(
    module: nn.Module, path: Path, meta: Mapping[str, Any], outside: Mapping[str, Tensor], strict: bool
) -> None:
    """Load a checkpoint that is known to be complete into a module.

    Args:
        module: See :func:`load_trained`.
        path: The checkpoint.
        meta: The content of its ``meta.json``.
        outside: The module's tensors outside its layers, from the checkpoint.
        strict: See :func:`load_trained`.

    Raises:
        ConfigurationError: If it is one of another model, or the module is not made of a list of layers.
    """
    layers, _ = hand_out_layers(module)
    if not isinstance(layers, SequentialLayers):
        raise ConfigurationError(
            f"{type(module).__name__} is not made of a list of layers, so {path} cannot be loaded into it: pass it to "
            "the Trainer as ckpt_path under PipeLiteStrategy, or convert it with `pipelite convert --checkpoint "
            f"{path}` and load the result with transformers and PEFT."
        )
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    whole = layers.build_stage(0, len(layers.names), device)
    with torch.no_grad():
        load_parameters(path, meta["stages"], whole, state_names(whole), strict)
    load_outside_layers(module, whole, outside, strict)
