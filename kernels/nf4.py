"""Weights in nf4 and their dequantisation: by bitsandbytes, or on GPUs by a kernel with bitwise identical results.

That kernel needs one launch where bitsandbytes needs three if the scales are themselves quantised, each through the
Python side of torch's dispatcher: for a layer of experts this takes the host longer than the GPU.
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

BLOCK, SCALES_BLOCK = 64, 256  # bitsandbytes': weights that share a scale, and scales that share one of their own
BLOCKS = 64  # dequantised by one program of the kernel


def dequantise(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Dequantise a weight.

    Args:
        parts: Codes, uint8, two per byte with the first in the upper half, and a float32 scale for each :data:`BLOCK`
            weights. Or the scales are quantised: uint8 codes, then, all in float32, a scale for each
            :data:`SCALES_BLOCK` of them, the 256 values of the codes, and the offset that is added to all, or one for
            each :data:`SCALES_BLOCK`.
        shape: The weight's shape.
        dtype: The weight's dtype: float32, bfloat16 or float16.
    """
    if runs_triton(parts[0]) and not parts[0].is_meta:
        return _by_triton(parts, shape, dtype)
    return dequantise_by_bitsandbytes(parts, shape, dtype)


def dequantise_by_bitsandbytes(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the same as :func:`dequantise`, by bitsandbytes on any device."""
    operations = bitsandbytes_operations()  # its functions take the host several times as long
    codes, scales, *nested = parts
    if nested:
        outer, outer_values, offset = nested
        scales = operations.dequantize_blockwise(scales, outer, outer_values, SCALES_BLOCK, torch.float32)
        scales += offset if offset.numel() == 1 else offset.repeat_interleave(SCALES_BLOCK)[: len(scales)]
    whole: Tensor = operations.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
    return whole


@cache
def bitsandbytes_operations() -> Any:
    """Return bitsandbytes' operations, with its 4-bit dequantisation corrected on CPUs.

    Its CPU kernel (0.50) starts a new block in each row, although a block is of consecutive weights, even across the
    end of a row: where a row is not a whole number of blocks, weights got the scales of others. So the kernel is given
    the weight as a single row. Remove when ``tests/kernels/test_nf4.py`` passes without.
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

    with warnings.catch_warnings():  # about overriding a kernel
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
    """Return the values of the codes 0 to 15, before scaling."""
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
