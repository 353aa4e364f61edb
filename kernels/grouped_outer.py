"""Sums of outer products over the rows of each group: the gradients of the matrices of a grouped product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import at_least_16, by_triton, is_traced, precision
from lightning_pipelite.kernels.groups import Groups, slices_of


def grouped_outer(
    u: Tensor, v: Tensor, groups: Groups, *, gather: bool = False, scores: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Return ``scale · Σ v uᵀ`` over the rows of each group.

    Args:
        u: [rows, few].
        v: [rows, width]; or, with ``gather``, [tokens, width].
        groups: How the rows are grouped.
        gather: Whether to gather the rows of v from its tokens.
        scores: [tokens, copies], multiplied into the rows of u first, with rounding to u's dtype; 1 if not given.
        scale: Factor of the sums.

    Returns:
        [groups, width, few], in at least float32.
    """
    if is_traced(u):
        return _outer_by_triton(u, v, groups, gather, scores, scale)
    return torch.ops.pipelite.grouped_outer(u, v, list(groups), gather, scores, scale)


_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define(
    "grouped_outer(Tensor u, Tensor v, Tensor[] groups, bool gather, Tensor? scores, float scale) -> Tensor"
)


@torch.library.register_fake("pipelite::grouped_outer", lib=_LIBRARY)
def _(u: Tensor, v: Tensor, groups: list[Tensor], gather: bool, scores: Tensor | None, scale: float) -> Tensor:
    dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(groups[2].shape[0] - 1, v.shape[1], u.shape[1], dtype=dtype)


@torch.library.impl(_LIBRARY, "grouped_outer", "CompositeExplicitAutograd")
def outer_operation(
    u: Tensor, v: Tensor, groups: list[Tensor], gather: bool, scores: Tensor | None, scale: float
) -> Tensor:
    """Sum v's rows times u's over each group, [groups, columns of v, columns of u], as one operation."""
    where = Groups(*groups)
    if by_triton(u):
        return _outer_by_triton(u, v, where, gather, scores, scale)
    exact = torch.promote_types(u.dtype, torch.float32)
    out = u.new_empty(where.number, v.shape[1], u.shape[1], dtype=exact)
    if u.is_meta:
        v[:1].expand(u.shape[0], -1).T @ u
        return out
    for group, each in slices_of(where):
        part = v[where.order[each] // where.copies] if gather else v[each]
        other = u[each].to(exact)
        if scores is not None:
            other = (other * scores.flatten()[where.order[each], None]).to(u.dtype).to(exact)
        out[group] = scale * (part.to(exact).T @ other)
    return out


def _outer_by_triton(u: Tensor, v: Tensor, groups: Groups, gather: bool, scores: Tensor | None, scale: float) -> Tensor:
    few, width = u.shape[1], v.shape[1]
    out = u.new_empty(groups.number, width, few, dtype=torch.float32)
    assert u.stride(1) == v.stride(1) == 1
    block = min(64, at_least_16(few))
    columns = 128 if u.element_size() == 2 else 64
    _outer[(-(-width // columns), groups.number, -(-few // block))](
        u, u.stride(0), v, v.stride(0), groups.order, groups.bounds, u if scores is None else scores, out,
        float(scale), width, few,
        COPIES=groups.copies if gather else 0, SCORED=scores is not None,
        FEW=block, COLUMNS=columns, DEPTH=64 if u.element_size() == 2 else 32,
        PRECISION=precision(u), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _outer(  # type: ignore[no-untyped-def]
    u, u_stride, v, v_stride, order, bounds, scores, out, scale, width, few,
    COPIES: tl.constexpr, SCORED: tl.constexpr, FEW: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    first, end = tl.load(bounds + group), tl.load(bounds + group + 1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    thin = tl.program_id(2) * FEW + tl.arange(0, FEW)
    inside, kept = columns < width, thin < few
    total = tl.zeros((COLUMNS, FEW), dtype=tl.float32)
    for start in range(first, end, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        there = rows < end
        taken = rows
        if COPIES > 0 or SCORED:
            copy = tl.load(order + rows, mask=there, other=0)
            if COPIES > 0:
                taken = copy // COPIES
        v_at = v + taken.to(tl.int64)[:, None] * v_stride + columns[None, :]
        u_at = u + rows.to(tl.int64)[:, None] * u_stride + thin[None, :]
        a = tl.load(v_at, mask=there[:, None] & inside[None, :], other=0.0)
        b = tl.load(u_at, mask=there[:, None] & kept[None, :], other=0.0)
        if SCORED:
            b = (b.to(tl.float32) * tl.load(scores + copy).to(tl.float32)[:, None]).to(b.dtype)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    at = out + (group.to(tl.int64) * width + columns[:, None]) * few + thin[None, :]
    tl.store(at, total * scale, mask=inside[:, None] & kept[None, :])
