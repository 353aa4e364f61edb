"""Where Triton's kernels run, and what they need to be told there."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Tell whether kernels run on ``tensor``: on a GPU, and anywhere under Triton's interpreter."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def by_triton(tensor: Tensor) -> bool:
    """Tell whether an operation that works in float32 runs its kernel on ``tensor``, not its plain torch."""
    return runs_triton(tensor) and not tensor.is_meta and tensor.dtype != torch.float64


def is_traced(tensor: Tensor) -> bool:
    """Tell whether the compiler looks on: it launches kernels itself, in half the time that it calls operations."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and torch.compiler.is_compiling()


def at_least_16(size: int) -> int:
    """Return the next power of two, of which Triton's products have 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


def precision(tensor: Tensor) -> str:
    """Return the precision of products of Triton for ``tensor``: of float32 in full, not by TF32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # which means nothing to narrower types
