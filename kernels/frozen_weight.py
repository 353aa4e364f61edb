"""Frozen weights, and the tensors that they are held as: whole, in nf4, or in FP8."""

from __future__ import annotations

from torch import Tensor

from lightning_pipelite.kernels import fp8, nf4

WHOLE = 1
"""Of how many tensors a frozen weight is made if it is held whole. In FP8 these are codes and scales, in nf4 what
:func:`~lightning_pipelite.kernels.nf4.dequantise` takes."""


def whole(weight: list[Tensor], rows: int, x: Tensor) -> Tensor:
    """Return the weight [rows, in] in x's dtype."""
    if len(weight) == WHOLE:
        return weight[0]
    if weight[0].dtype == fp8.DTYPE:
        return fp8.dequantise_rows(weight[0], weight[1], x.dtype)
    return nf4.dequantise(weight, (rows, x.shape[-1]), x.dtype)
