"""What LoRA and Control Adapters share: dtypes, seeds of initial values, and names in the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_pipelite.adapters import option_ranges
from lightning_pipelite.models.meta_model import MetaModel

FILE_PREFIX = "base_model.model."
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in option_ranges.DTYPES}


def named_as_whole(states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> dict[str, Tensor]:
    """Return the tensors of all stages by the names that PEFT expects, in the model that the directory loads as."""
    return {
        FILE_PREFIX + meta_model.whole.name(name.removeprefix(FILE_PREFIX)): tensor
        for state in states
        for name, tensor in state.items()
    }


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator whose state depends only on ``seed`` and ``name``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
