"""Loads what a checkpoint has trained into a module, without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lightning_pipelite.checkpoint.reader import check_whole, located
from lightning_pipelite.checkpoint.stage_state import load_parameters, state_names
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.layers import SequentialLayers, hand_out_layers

Module = TypeVar("Module", bound=nn.Module)


def load_trained(module: Module, directory: str | Path, strict: bool = True) -> Module:
    """Load the trained parameters and the buffers of a checkpoint, of however many stages.

    Args:
        module: as it was made for the training, with a method ``pipeline_layers()`` that returns a list of layers.
        directory: the checkpoint.
        strict: whether the checkpoint has to have all of its trained parameters, and no others.

    Returns:
        The module.

    Raises:
        ConfigurationError: if this is no whole checkpoint, or one of another model.
    """
    path = located(Path(directory))
    meta = check_whole(path)
    layers, _ = hand_out_layers(module)
    if not isinstance(layers, SequentialLayers):
        raise ConfigurationError(
            f"{type(module).__name__} is not made of a list of layers: use `pipelite convert --checkpoint "
            f"{directory}`, and load what that writes with transformers and PEFT."
        )
    whole = layers.build_stage(0, len(layers.names), torch.device("cpu"))
    with torch.no_grad():
        load_parameters(path, meta["stages"], whole, state_names(whole), strict)
    return module
