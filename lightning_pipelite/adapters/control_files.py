"""Reads Control Adapters from disk, those of qlora-pipe-lite too."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError

NAME = re.compile(r"(?:.*\.)?(\d+)\.control_([QS])")


def load_control_adapter(directory: str | Path) -> dict[int, tuple[Tensor, Tensor]]:
    """Read a Control Adapter: ``adapter_model.safetensors``, or ``adapter_model.bin`` of qlora-pipe-lite.

    Args:
        directory: Holds the file.

    Returns:
        Q [hidden, rank] and S [rank] of each decoder layer that has them, by its number.

    Raises:
        ConfigurationError: There is no such file, or it holds something else.
    """
    paths = [Path(directory) / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ConfigurationError(f"{directory} has no adapter_model.safetensors; name the directory of an adapter.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the damage
        raise ConfigurationError(f"{path} cannot be read ({error}); save the adapter again.") from error
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise ConfigurationError(f"{path} holds {name}, so it is no Control Adapter with Q and S; name another.")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    for number, parts in layers.items():
        q, s = parts.get("Q"), parts.get("S")
        if q is None or s is None or q.ndim != 2 or s.shape != q.shape[1:]:
            raise ConfigurationError(f"{path} lacks Q [hidden, rank] or S [rank] of layer {number}; save it again.")
    return {number: (parts["Q"], parts["S"]) for number, parts in sorted(layers.items())}
