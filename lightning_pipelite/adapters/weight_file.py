"""Reads the tensors of an adapter's directory."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError

WEIGHTS_FILE = "adapter_model.safetensors"


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's directory, by name.

    Raises:
        ConfigurationError: They are missing or damaged.
    """
    path, pickled = directory / WEIGHTS_FILE, directory / "adapter_model.bin"
    if not (path.exists() or pickled.exists()):
        raise ConfigurationError(f"{directory} has no {WEIGHTS_FILE}; give the directory of an adapter.")
    try:
        return load_file(path) if path.exists() else torch.load(pickled, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, UnpicklingError) as error:
        raise ConfigurationError(f"{directory} cannot be read ({error}); fetch it again.") from None
