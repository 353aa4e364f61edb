"""What LoRA and Control Adapters have in common: options, initial values, and names in the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.fingerprint import BASE_FILE
from lightning_pipelite.models.meta_model import MetaModel

FILE_PREFIX = "base_model.model."
KNOWN_FILES = ("adapter_config.json", "adapter_model.safetensors", BASE_FILE, "README.md")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_options(rank: int, dropout: float, dtype: str) -> None:
    """Check the options that both have.

    Raises:
        ConfigurationError: A value out of its range.
    """
    if rank < 1:
        raise ConfigurationError(f"rank is {rank}; set it to 1 or more.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigurationError(f"dropout is {dropout}; set it to at least 0 and less than 1.")
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; set it to one of {', '.join(DTYPES)}.")


def named_as_whole(states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> dict[str, Tensor]:
    """Return the tensors of all stages by the names that PEFT looks for, in the model that the directory loads as."""
    return {
        FILE_PREFIX + meta_model.whole.name(name.removeprefix(FILE_PREFIX)): tensor
        for state in states
        for name, tensor in state.items()
    }


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a generator on the CPU whose state depends on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
