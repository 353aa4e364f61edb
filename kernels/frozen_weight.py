"""Frozen weights, and the tensors that they are held as: whole, in nf4, or in FP8."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

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
    operations = bitsandbytes_operations()  # as its functions take the host several times as long
    codes, scales = parts[:FOUR_BIT]
    if len(parts) == DOUBLE:
        outer, outer_values, offset = parts[FOUR_BIT:]
        scales = operations.dequantize_blockwise(scales, outer, outer_values, SCALES_BLOCK, torch.float32)
        scales += offset
    whole: Tensor = operations.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
    return whole


@cache
def bitsandbytes_operations() -> Any:
    """Return the operations of bitsandbytes, that of 4-bit weights right on CPUs too.

    There its kernel (0.50) begins a block of weights anew in each row, though a scale is that of so many weights one
    after the other, also over the end of a row: where rows are no whole blocks, weights took the scales of others. So
    it is given all in one row. Remove when ``tests/kernels/test_frozen_weight.py`` passes without.
    """
    import bitsandbytes  # noqa: F401 (makes them)

    name = "bitsandbytes::dequantize_4bit"
    of_cpus = torch.library.get_kernel(name, "CPU")

    def dequantize_4bit(
        keys: Any, codes: Tensor, scales: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        row = [1, math.prod(shape)]
        whole: Tensor = of_cpus.call_boxed(keys, codes, scales, block, kind, row, dtype)
        return whole.view(*shape)

    with warnings.catch_warnings():  # of the overriding
        warnings.simplefilter("ignore")
        _LIBRARY.impl("dequantize_4bit", dequantize_4bit, "CPU", with_keyset=True, allow_override=True)
    return torch.ops.bitsandbytes


_LIBRARY = torch.library.Library("bitsandbytes", "FRAGMENT")
