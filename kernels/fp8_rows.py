"""Rows of values as FP8 codes with a scale each.

The format is e4m3 of Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import by_triton, is_traced
from lightning_pipelite.kernels.launch import launch

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # the format's largest value
SMALLEST = 2.0**-100  # lower limit of a row's largest absolute value, so that no scale is zero

WIDEST = 4096  # a row up to which the compiler casts in what computes it
BLOCK = 2048  # columns at a time; with the warps below within 2 % of the fastest of eleven layouts on an H200


def quantise_rows(x: Tensor, by: Tensor | None = None) -> list[Tensor]:
    """Quantise x row by row: return e4m3 codes of its shape and a float32 scale for each row [rows].

    In plain torch, for all devices. A row that holds a NaN or an infinity becomes NaN.

    Args:
        x: [..., width].
        by: [width], multiplied into x first.
    """
    wide = x.float() if by is None else x.float() * by
    scales = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    codes = (wide / scales).clamp(-LARGEST, LARGEST).to(DTYPE)
    return [codes.contiguous(), scales.flatten()]


def dequantise_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes [rows, width] times scales [rows], exact except for the rounding to ``dtype``."""
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)


def cast_rows(x: Tensor, by: Tensor | None = None) -> list[Tensor]:
    """Compute :func:`quantise_rows` for the inputs and gradients of a layer, in the fastest way.

    The compiler fuses the cast of narrow rows into what computes them. Wide ones it would compute twice, once for their
    scales and once for their codes, so a kernel reads them. It multiplies by the reciprocals of scales: a value within
    float32's rounding of the middle between two codes may get the other one.
    """
    if x.shape[-1] <= WIDEST:
        return quantise_rows(x, by)
    return [*(_cast_by_triton(x, by) if is_traced(x) else torch.ops.pipelite.fp8_cast_rows(x, by))]


_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define("fp8_cast_rows(Tensor x, Tensor? by) -> (Tensor, Tensor)")


@torch.library.impl(_LIBRARY, "fp8_cast_rows", "CompositeExplicitAutograd")
def cast_operation(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute :func:`cast_rows`, as one operation that is opaque to torch.compile."""
    if by_triton(x):
        return _cast_by_triton(x, by)
    codes, scales = _empty(x) if x.is_meta else quantise_rows(x, by)
    return codes, scales


@torch.library.register_fake("pipelite::fp8_cast_rows", lib=_LIBRARY)
def _(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(x)


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape, dtype=DTYPE), x.new_empty(rows, dtype=torch.float32)


def _cast_by_triton(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    x, width = x.contiguous(), x.shape[-1]
    by = None if by is None else by.contiguous()
    codes, scales = _empty(x)
    if x.numel():
        launch(
            _cast, (scales.numel(), 1, 1), x, x if by is None else by, codes, scales, width,
            MULTIPLIED=by is not None, LARGEST=LARGEST, SMALLEST=SMALLEST, BLOCK=BLOCK,
            num_warps=8 if width <= 16_384 else 16,
        )  # fmt: skip
    return codes, scales


@triton.jit
def _cast(  # type: ignore[no-untyped-def]
    x, by, codes, scales, width,
    MULTIPLIED: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cast a row, which lies in the cache when it is read for the second time."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * width
    codes += row.to(tl.int64) * width
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    nothing = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        if MULTIPLIED:
            value *= tl.load(by + column, mask=column < width, other=0.0)
        most = tl.maximum(most, tl.abs(value))
        nothing += value * 0.0  # NaN, once there is a NaN or an infinity: maxima drop these
    largest = tl.maximum(tl.max(most, axis=0), SMALLEST) + tl.sum(nothing, axis=0)
    scale = tl.math.div_rn(largest, LARGEST)
    tl.store(scales + row, scale)
    inverse = tl.math.div_rn(1.0, scale)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        if MULTIPLIED:
            value *= tl.load(by + column, mask=column < width, other=0.0)
        code = tl.minimum(tl.maximum(value * inverse, -LARGEST), LARGEST)
        tl.store(codes + column, code.to(codes.dtype.element_ty), mask=column < width)
