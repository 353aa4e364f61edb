"""Sums of a wide matrix and a product of two thin ones, at the speed at which memory is read and written.

Matrix libraries are made for products that take longer than reading their operands. On an H200, for 4096 x 28672 values
in bfloat16 that become two matrices, and rank 16 each: 0.145 ms, 77 % of the speed of a copy; 0.464 by torch.addmm and
two copies (benchmarks/fp8_speed.py). For 4096 x 4096 it is 0.023 ms and 0.029, less of a gain than the launch of a
Triton kernel costs the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import at_least_16, by_triton, precision
from lightning_pipelite.kernels.launch import launch

NARROW = 4096  # columns up to which torch's product is used
MOST = 3  # parts of a matrix that the kernel tells apart
ROWS, COLUMNS, FEW = 64, 128, 64  # of a block; columns of left at a time (at most)


def add_low_rank(base: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, *, turned: bool) -> Tensor:
    """Compute ``base += scale * left @ right``, summed in at least float32, and return base.

    Args:
        base: [rows, width], contiguous.
        left: [rows, few], or columns of a larger matrix; of base's dtype.
        right: [few, width], of base's dtype.
        scale: A factor of the product.
        turned: Whether right is transposed: [width, few].
    """
    if base.shape[1] <= NARROW or not _fits(base):
        return base.addmm_(left, right.T if turned else right, alpha=scale)
    _launch(base, left, [right], [base], scale, turned)
    return base


def low_rank_sums(base: Tensor, left: Tensor, rights: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Return ``base_i + scale * left_i @ right_iᵀ`` for consecutive columns of base and of left, apart from each other.

    Args:
        base: [rows, the sum of the widths], contiguous.
        left: [rows, the sum of the fews], of base's dtype.
        rights: [width, few] each, of base's dtype.
        scale: A factor of the products.

    Returns:
        [rows, width] each, contiguous.
    """
    widths, fews = ([right.shape[side] for right in rights] for side in (0, 1))
    if len(rights) > MOST or not _fits(base):
        each = zip(base.split(widths, dim=1), left.split(fews, dim=1), rights, strict=True)
        return [torch.addmm(part, few, right.T, alpha=scale) for part, few, right in each]
    outs = [base.new_empty(base.shape[0], width) for width in widths]
    _launch(base, left, [*rights], outs, scale, True)
    return outs


def _fits(base: Tensor) -> bool:
    return by_triton(base) and base.numel() > 0


def _launch(base: Tensor, left: Tensor, rights: list[Tensor], outs: list[Tensor], scale: float, turned: bool) -> None:
    rows, width = base.shape
    widths = [out.shape[1] for out in outs]
    fews = [right.shape[1 if turned else 0] for right in rights]
    left = left if left.stride(1) == 1 else left.contiguous()
    rights = [right.contiguous() for right in rights]
    blocks, missing = sum(-(-each // COLUMNS) for each in widths), MOST - len(outs)
    # One stage: with so few columns of left the loop runs once, and buffers for more would exceed a small GPU's memory.
    launch(
        _add, (blocks, -(-rows // ROWS), 1), base, left, *rights, *rights[:1] * missing, *outs, *outs[:1] * missing,
        rows, width, left.stride(0), *widths, *[0] * missing, *fews, *[0] * missing,
        TURNED=turned, SCALE=float(scale), ROWS=ROWS, COLUMNS=COLUMNS, FEW=min(FEW, at_least_16(max(fews))),
        PRECISION=precision(base), num_warps=8, num_stages=1,
    )  # fmt: skip


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    base, left, right_1, right_2, right_3, out_1, out_2, out_3, rows, of_base, of_left, width_1, width_2, width_3,
    few_1, few_2, few_3,
    TURNED: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = tl.cdiv(width_1, COLUMNS)
    second = first + tl.cdiv(width_2, COLUMNS)
    base, left, there = base + row * of_base, left + row * of_left, row < rows
    if block < first:
        _add_part(base, left, right_1, out_1, row, there, block, width_1, few_1,
                  TURNED, SCALE, COLUMNS, FEW, PRECISION)  # fmt: skip
    elif block < second:
        _add_part(base + width_1, left + few_1, right_2, out_2, row, there, block - first, width_2, few_2,
                  TURNED, SCALE, COLUMNS, FEW, PRECISION)  # fmt: skip
    else:
        _add_part(base + width_1 + width_2, left + few_1 + few_2, right_3, out_3, row, there, block - second, width_3,
                  few_3, TURNED, SCALE, COLUMNS, FEW, PRECISION)  # fmt: skip


@triton.jit
def _add_part(  # type: ignore[no-untyped-def]
    base, left, right, out, row, there, block, width, few,
    TURNED: tl.constexpr, SCALE: tl.constexpr, COLUMNS: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = there & (column < width)
    before = tl.load(base + column, mask=inside, other=0.0)
    total = tl.zeros(before.shape, dtype=tl.float32)
    for start in range(0, few, FEW):
        thin = start + tl.arange(0, FEW)
        of_row = tl.load(left + thin[None, :], mask=there & (thin < few)[None, :], other=0.0)
        if TURNED:
            place = right + column.to(tl.int64) * few + thin[:, None]
        else:
            place = right + thin.to(tl.int64)[:, None] * width + column
        of_column = tl.load(place, mask=(thin < few)[:, None] & (column < width), other=0.0)
        total = tl.dot(of_row, of_column, total, input_precision=PRECISION)
    tl.store(out + row * width + column, (before.to(tl.float32) + SCALE * total).to(before.dtype), mask=inside)
