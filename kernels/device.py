"""Where Triton kernels run, and parameters that depend on it."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Tell whether Triton kernels run on ``tensor``: on a GPU, or anywhere under Triton's interpreter."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def by_triton(tensor: Tensor) -> bool:
    """Tell whether an operation that computes in float32 uses its Triton kernel on ``tensor``, not plain torch."""
    return runs_triton(tensor) and not tensor.is_meta and tensor.dtype != torch.float64


def is_traced(tensor: Tensor) -> bool:
    """Tell whether Dynamo is tracing: it launches kernels itself in half the time that a custom op takes.

    AOTAutograd, which traces the gradients of composite operations, cannot; from torch 2.13 on, `is_compiling` is true
    there as well.
    """
    return tensor.is_cuda and tensor.dtype != torch.float64 and torch.compiler.is_dynamo_compiling()


def at_least_16(size: int) -> int:
    """Return the next power of two, at least 16, the smallest side of a block in Triton's products."""
    return max(16, 1 << (size - 1).bit_length())


def precision(tensor: Tensor) -> str:
    """Return the ``input_precision`` of Triton's products for ``tensor``: full float32, not TF32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # ignored for narrower types
