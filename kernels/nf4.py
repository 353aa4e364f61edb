"""Weights in nf4, and how they are made whole: by bitsandbytes, on GPUs by a kernel that gives the same to the bit.

That kernel takes one launch where bitsandbytes takes three, if scales are quantised themselves, each of them through
Python of torch's dispatcher: a layer of experts takes the host longer than the GPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import runs_triton
from lightning_pipelite.kernels.launch import launch

BLOCK, SCALES_BLOCK = 64, 256  # of bitsandbytes: how many weights have one scale, and how many scales have one
BLOCKS = 64  # that a program of the kernel makes whole


def dequantise(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a weight from what it is held as.

    Args:
        parts: Codes, uint8, two of them a byte, the first in its upper half, and for each :data:`BLOCK` weights a
            scale, float32. Or scales in uint8, and what they stand for: a scale for each :data:`SCALES_BLOCK` of them,
            the 256 values of their codes, and what is added to all, or to each :data:`SCALES_BLOCK`, all float32.
        shape: Of the weight.
        dtype: Of the weight: float32, bfloat16 or float16.
    """
    if runs_triton(parts[0]) and not parts[0].is_meta:
        return _by_triton(parts, shape, dtype)
    return dequantise_by_bitsandbytes(parts, shape, dtype)


def dequantise_by_bitsandbytes(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the same as :func:`dequantise`, by bitsandbytes on any device."""
    operations = bitsandbytes_operations()  # as its functions take the host several times as long
    codes, scales, *nested = parts
    if nested:
        outer, outer_values, offset = nested
        scales = operations.dequantize_blockwise(scales, outer, outer_values, SCALES_BLOCK, torch.float32)
        scales += offset if offset.numel() == 1 else offset.repeat_interleave(SCALES_BLOCK)[: len(scales)]
    whole: Tensor = operations.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
    return whole


@cache
def bitsandbytes_operations() -> Any:
    """Return the operations of bitsandbytes, that of 4-bit weights right on CPUs too.

    There its kernel (0.50) begins a block of weights anew in each row, though a scale is that of so many weights one
    after the other, also over the end of a row: where rows are no whole blocks, weights took the scales of others. So
    it is given all in one row. Remove when ``tests/kernels/test_nf4.py`` passes without.
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


def _by_triton(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    codes, scales, *nested = parts
    outer, outer_values, offset = nested or (scales, scales, scales)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    count = out.numel()
    launch(
        _dequantise, (triton.cdiv(count, BLOCK * BLOCKS), 1, 1),
        codes, _values(codes.device), scales, outer, outer_values, offset, out, count,
        NESTED=bool(nested), OFFSETS=offset.numel() > 1, WHOLE=count % (BLOCK * BLOCKS) == 0,
        BLOCK=BLOCK, SCALES_BLOCK=SCALES_BLOCK, BLOCKS=BLOCKS,
        enable_fp_fusion=False,  # a scale is rounded before the offset is added
    )  # fmt: skip
    return out


@cache
def _values(device: torch.device) -> Tensor:
    """Return what the codes 0 to 15 stand for, before they are scaled."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type("nf4", device=device)
    return values


@triton.jit
def _dequantise(  # type: ignore[no-untyped-def]
    codes, values, scales, outer, outer_values, offset, out, count,
    NESTED: tl.constexpr, OFFSETS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, SCALES_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block * BLOCK < count
    if NESTED:
        code = tl.load(scales + block, mask=there, other=0)
        scale = tl.load(outer_values + code) * tl.load(outer + block // SCALES_BLOCK, mask=there, other=0.0)
        if OFFSETS:
            scale += tl.load(offset + block // SCALES_BLOCK, mask=there, other=0.0)
        else:
            scale += tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=there, other=0.0)
    pair = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    two = tl.load(codes + pair) if WHOLE else tl.load(codes + pair, mask=pair * 2 < count, other=0)
    first = tl.load(values + (two >> 4)) * scale[:, None]
    second = tl.load(values + (two & 15)) * scale[:, None]
    both = tl.interleave(first, second).to(out.dtype.element_ty)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        tl.store(out + at, both)
    else:
        tl.store(out + at, both, mask=at < count)
