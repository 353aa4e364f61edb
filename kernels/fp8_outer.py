"""The gradient of a matrix whose input was saved as FP8 codes only, which are never dequantised in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import at_least_16, by_triton, precision
from lightning_pipelite.kernels.fp8_rows import dequantise_rows
from lightning_pipelite.kernels.launch import launch

COLUMNS, DEPTH, FEW = 128, 64, 64  # of a block: columns of x, rows at a time, and columns of u (at most)
PROGRAMS = 1056  # about as many as keep a large GPU's memory busy


def outer_with_codes(u: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return ``uᵀ x`` in at least float32, where x = diag(scales) codes.

    Rows of u are multiplied by the scales and rounded to its dtype, in which e4m3 codes are exact. Long sums are split
    into parts that depend only on the shapes, and these are added in order: the result is the same in every run.

    Args:
        u: [rows, few], contiguous.
        codes: E4m3 [rows, width], contiguous.
        scales: Float32 [rows].

    Returns:
        [few, width].
    """
    exact = torch.promote_types(u.dtype, torch.float32)
    if u.is_meta:  # counts as the product, and allocates no more than the kernel
        return torch.mm(u.T, codes.to(u.dtype), out_dtype=exact)
    if not by_triton(u):
        return u.T.to(exact) @ dequantise_rows(codes, scales, exact)
    (rows, few), width = u.shape, codes.shape[1]
    block = min(FEW, at_least_16(few))
    across, thick = triton.cdiv(width, COLUMNS), triton.cdiv(few, block)
    # Each part has at least four blocks. The parts' sums take about 35 MB, or twice the result.
    parts = max(1, min(triton.cdiv(PROGRAMS, across * thick), rows // (4 * DEPTH)))
    part = triton.cdiv(triton.cdiv(rows, parts), DEPTH) * DEPTH
    sums = u.new_empty(parts, few, width, dtype=exact)
    launch(
        _outer, (across, parts, thick), u, codes, scales, sums, rows, part, width, few,
        FEW=block, COLUMNS=COLUMNS, DEPTH=DEPTH, PRECISION=precision(u), num_warps=4, num_stages=2,
    )  # fmt: skip
    return sums[0] if parts == 1 else sums.sum(0)


@triton.jit
def _outer(  # type: ignore[no-untyped-def]
    u, codes, scales, sums, rows, part, width, few,
    FEW: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    thin = tl.program_id(2) * FEW + tl.arange(0, FEW)
    first = tl.program_id(1) * part
    end = tl.minimum(first + part, rows)
    inside, kept = columns < width, thin < few
    total = tl.zeros((FEW, COLUMNS), dtype=tl.float32)
    for start in range(first, end, DEPTH):
        row = start + tl.arange(0, DEPTH)
        there, at = row < end, row.to(tl.int64)[:, None]
        of_x = tl.load(codes + at * width + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        of_u = tl.load(u + at * few + thin[None, :], mask=there[:, None] & kept[None, :], other=0.0)
        scale = tl.load(scales + row, mask=there, other=0.0)
        scaled = (of_u.to(tl.float32) * scale[:, None]).to(of_u.dtype)
        total = tl.dot(tl.trans(scaled), of_x.to(of_u.dtype), total, input_precision=PRECISION)
    to = sums + (tl.program_id(1).to(tl.int64) * few + thin[:, None]) * width + columns[None, :]
    tl.store(to, total, mask=kept[:, None] & inside[None, :])
