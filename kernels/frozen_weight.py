"""Frozen weights, and the tensors that they are held as: whole, in nf4, or in FP8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_pipelite.kernels import fp8

WHOLE, FOUR_BIT, DOUBLE = 1, 2, 5
"""Of how many tensors a frozen weight is made: itself; nf4 codes and their scales; or scales that are
quantised themselves, which takes their own scales, values and offset as well."""

BLOCK, SCALES_BLOCK = 64, 256  # of bitsandbytes: how many weights have one scale, and how many scales have one


def whole(weight: list[Tensor], rows: int, x: Tensor) -> Tensor:
    """Return the weight [rows, in] in x's dtype."""
    if len(weight) == WHOLE:
        return weight[0]
    if weight[0].dtype == fp8.DTYPE:
        return fp8.dequantise_rows(weight[0], weight[1], x.dtype)
    return dequantise(weight, (rows, x.shape[-1]), x.dtype)


def dequantise(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a weight in ``dtype`` from its parts in nf4, see :data:`FOUR_BIT`."""
    import bitsandbytes  # noqa: F401 (for its operations, as its functions take the host several times as long)

    codes, scales = parts[:FOUR_BIT]
    if len(parts) == DOUBLE:
        outer, outer_values, offset = parts[FOUR_BIT:]
        scales = torch.ops.bitsandbytes.dequantize_blockwise(scales, outer, outer_values, SCALES_BLOCK, torch.float32)
        scales += offset
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
