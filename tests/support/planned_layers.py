"""Layers whose training is planned, and run on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from optimi import Adam
from torch import nn

from lightning_pipelite.adapters import Adapter
from lightning_pipelite.models import CausalLMLayers

LENGTH = 256


def make_adam(parameters: list[nn.Parameter]) -> Adam:
    return Adam(parameters, lr=1e-3)


def make_layers(model_dir: Path, adapter: Adapter, **options: Any) -> CausalLMLayers:
    # Attention in plain operations: other implementations save different tensors on a CPU than on a GPU.
    options = {"dtype": torch.float32, "attn_implementation": "eager", "compile_layers": False, **options}
    return CausalLMLayers(model_dir, adapter=adapter, fuse_head=False, **options)
