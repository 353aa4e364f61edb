"""Rows of values as FP8 codes with a scale each.

The format is e4m3 of Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
MOST = 3  # parts that the kernel reads
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
    return [*(_cast_by_triton([x], by) if is_traced(x) else torch.ops.pipelite.fp8_cast_rows(x, by))]


def cast_now(parts: Sequence[Tensor], by: Tensor | None = None) -> list[Tensor]:
    """Compute :func:`cast_rows` inside of another operation, where no compiler could fuse it into anything.

    Args:
        parts: [..., width] each: columns of the rows, in order.
        by: [the sum of the widths], multiplied into the rows first.
    """
    if by_triton(parts[0]):
        return [*_cast_by_triton(parts, by)]
    return [*_empty(parts)] if parts[0].is_meta else quantise_rows(_whole(parts), by)


_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define("fp8_cast_rows(Tensor x, Tensor? by) -> (Tensor, Tensor)")


@torch.library.impl(_LIBRARY, "fp8_cast_rows", "CompositeExplicitAutograd")
def cast_operation(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute :func:`cast_rows`, as one operation that is opaque to torch.compile."""
    codes, scales = cast_now([x], by)
    return codes, scales


@torch.library.register_fake("pipelite::fp8_cast_rows", lib=_LIBRARY)
def _(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty([x])


def _whole(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=-1)


def _empty(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return memory for the codes and scales."""
    shape, width = parts[0].shape[:-1], sum(part.shape[-1] for part in parts)
    codes = parts[0].new_empty(*shape, width, dtype=DTYPE)
    return codes, parts[0].new_empty(math.prod(shape), dtype=torch.float32)  # numel() would fix a dynamic shape


def _cast_by_triton(parts: Sequence[Tensor], by: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = [part.contiguous() for part in (parts if len(parts) <= MOST else [_whole(parts)])]
    by = None if by is None else by.contiguous()
    codes, scales = _empty(parts)
    if codes.numel():
        widths = [part.shape[-1] for part in parts] + [0] * (MOST - len(parts))
        # What stands in for missing operands: a compiled graph would compute and write a part once for each.
        missing = parts[0].new_empty(1) if is_traced(parts[0]) else parts[0]
        first, second, third = [*parts, *[missing] * MOST][:MOST]
        launch(
            _cast, (scales.numel(), 1, 1), first, second, third, missing if by is None else by, codes, scales, *widths,
            PARTS=len(parts), MULTIPLIED=by is not None, LARGEST=LARGEST, SMALLEST=SMALLEST, BLOCK=BLOCK,
            num_warps=8 if codes.shape[-1] <= 16_384 else 16,
        )  # fmt: skip
    return codes, scales


@triton.jit
def _cast(  # type: ignore[no-untyped-def]
    x, y, z, by, codes, scales, of_x, of_y, of_z,
    PARTS: tl.constexpr, MULTIPLIED: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cast a row of up to three parts, which lies in the cache when it is read for the second time."""
    row = tl.program_id(0).to(tl.int64)
    x, y, z = x + row * of_x, y + row * of_y, z + row * of_z
    codes += row * (of_x + of_y + of_z)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    nothing = tl.zeros((BLOCK,), dtype=tl.float32)
    most, nothing = _largest(x, by, of_x, most, nothing, MULTIPLIED, BLOCK)
    if PARTS > 1:
        most, nothing = _largest(y, by + of_x, of_y, most, nothing, MULTIPLIED, BLOCK)
    if PARTS > 2:
        most, nothing = _largest(z, by + of_x + of_y, of_z, most, nothing, MULTIPLIED, BLOCK)
    largest = tl.maximum(tl.max(most, axis=0), SMALLEST) + tl.sum(nothing, axis=0)
    scale = tl.math.div_rn(largest, LARGEST)
    tl.store(scales + row, scale)
    inverse = tl.math.div_rn(1.0, scale)
    _write(x, by, codes, of_x, inverse, MULTIPLIED, LARGEST, BLOCK)
    if PARTS > 1:
        _write(y, by + of_x, codes + of_x, of_y, inverse, MULTIPLIED, LARGEST, BLOCK)
    if PARTS > 2:
        _write(z, by + of_x + of_y, codes + of_x + of_y, of_z, inverse, MULTIPLIED, LARGEST, BLOCK)


@triton.jit
def _largest(x, by, width, most, nothing, MULTIPLIED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(0, width, BLOCK):
        value = _values(x, by, start, width, MULTIPLIED, BLOCK)
        most = tl.maximum(most, tl.abs(value))
        nothing += value * 0.0  # NaN, once there is a NaN or an infinity: maxima drop these
    return most, nothing


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    x, by, codes, width, inverse, MULTIPLIED: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    for start in range(0, width, BLOCK):
        code = _values(x, by, start, width, MULTIPLIED, BLOCK) * inverse
        code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
        column = start + tl.arange(0, BLOCK)
        tl.store(codes + column, code.to(codes.dtype.element_ty), mask=column < width)


@triton.jit
def _values(x, by, start, width, MULTIPLIED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = start + tl.arange(0, BLOCK)
    value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    if MULTIPLIED:
        value *= tl.load(by + column, mask=column < width, other=0.0)
    return value
