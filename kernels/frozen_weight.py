"""Frozen weights and the tensors that hold them: unquantised, in nf4, or in FP8."""

from __future__ import annotations

from torch import Tensor

from lightning_pipelite.kernels import fp8_rows, nf4

WHOLE = 1
"""The number of tensors that hold an unquantised weight. In FP8 there are codes, scales and perhaps transposed codes,
in nf4 what :func:`~lightning_pipelite.kernels.nf4.dequantise` takes."""


def whole(weight: list[Tensor], rows: int, x: Tensor) -> Tensor:
    """Return the weight [rows, in] in x's dtype, dequantised if necessary."""
    if len(weight) == WHOLE:
        return weight[0]
    if weight[0].dtype == fp8_rows.DTYPE:
        return fp8_rows.dequantise_rows(weight[0], weight[1], x.dtype)
    return nf4.dequantise(weight, (rows, x.shape[-1]), x.dtype)
