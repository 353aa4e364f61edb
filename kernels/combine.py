"""Combines the outputs of a token's experts: the sum of its copies, weighted by the router's scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import at_least_16, by_triton, is_traced
from lightning_pipelite.kernels.groups import Groups


def sum_copies(y: Tensor, groups: Groups, scores: Tensor | None = None) -> Tensor:
    """Return the sum of each token's rows of ``y``, weighted by their scores, added in at least float32.

    Args:
        y: [rows, width].
        groups: How the rows are grouped.
        scores: [tokens, copies], of any floating dtype, contiguous; all are 1 if not given.

    Returns:
        [tokens, width], in y's dtype.
    """
    if is_traced(y):
        return _sum_by_triton(y, groups, scores)
    return torch.ops.pipelite.sum_copies(y, list(groups), scores)


def weigh(gradient: Tensor, y: Tensor, groups: Groups, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``y`` and ``scores``, given that of their product, each row of y times its score.

    Args:
        gradient: [rows, width].
        y: [rows, width].
        groups: How the rows are grouped.
        scores: [tokens, copies], contiguous.

    Returns:
        [rows, width] in y's dtype, and [tokens, copies] in at least float32.
    """
    if is_traced(y):
        return _weigh_by_triton(gradient, y, groups, scores)
    return torch.ops.pipelite.weigh(gradient, y, list(groups), scores)


_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define("sum_copies(Tensor y, Tensor[] groups, Tensor? scores) -> Tensor")
_LIBRARY.define("weigh(Tensor gradient, Tensor y, Tensor[] groups, Tensor scores) -> (Tensor, Tensor)")


@torch.library.register_fake("pipelite::sum_copies", lib=_LIBRARY)
def _(y: Tensor, groups: list[Tensor], scores: Tensor | None) -> Tensor:
    return y.new_empty(groups[1].shape[0], y.shape[1])


@torch.library.impl(_LIBRARY, "sum_copies", "CompositeExplicitAutograd")
def sum_operation(y: Tensor, groups: list[Tensor], scores: Tensor | None) -> Tensor:
    """Sum the copies of each token, weighted by their scores, as one operation."""
    where = Groups(*groups)
    if by_triton(y):
        return _sum_by_triton(y, where, scores)
    tokens, copies = where.places.shape
    out = y.new_empty(tokens, y.shape[1])
    if y.is_meta:
        return out
    exact = torch.promote_types(y.dtype, torch.float32)
    total = torch.zeros(tokens, y.shape[1], dtype=exact, device=y.device)
    for copy in range(copies):
        part = y[where.places[:, copy]].to(exact)
        total += part if scores is None else part * scores[:, copy, None].to(exact)
    return out.copy_(total)


@torch.library.register_fake("pipelite::weigh", lib=_LIBRARY)
def _(gradient: Tensor, y: Tensor, groups: list[Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape), y.new_empty(scores.shape, dtype=dtype)


@torch.library.impl(_LIBRARY, "weigh", "CompositeExplicitAutograd")
def weigh_operation(gradient: Tensor, y: Tensor, groups: list[Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of y and the scores in :func:`sum_operation`, as one operation."""
    where = Groups(*groups)
    if by_triton(y):
        return _weigh_by_triton(gradient, y, where, scores)
    exact = torch.promote_types(y.dtype, torch.float32)
    if y.is_meta:
        return y.new_empty(y.shape), y.new_empty(scores.shape, dtype=exact)
    along = (gradient.to(exact) * y.to(exact)).sum(1)
    of_y = (gradient.to(exact) * scores.flatten()[where.order, None].to(exact)).to(y.dtype)
    return of_y, along[where.places]


def _sum_by_triton(y: Tensor, groups: Groups, scores: Tensor | None) -> Tensor:
    tokens, width = groups.places.shape[0], y.shape[1]
    out = y.new_empty(tokens, width)
    block = min(1024, at_least_16(width))
    _sum_copies[(tokens, -(-width // block))](
        y, groups.places, y if scores is None else scores, out, width,
        COPIES=groups.copies, SCORED=scores is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _weigh_by_triton(gradient: Tensor, y: Tensor, groups: Groups, scores: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = y.shape
    of_y, of_scores = torch.empty_like(y), scores.new_empty(scores.shape, dtype=torch.float32)
    block = min(2048, at_least_16(width))
    _weigh[(rows,)](
        gradient, y, groups.order, scores, of_y, of_scores, width, BLOCK=block, num_warps=2 if block <= 1024 else 4
    )
    return of_y, of_scores


@triton.jit
def _sum_copies(  # type: ignore[no-untyped-def]
    y, places, scores, out, width, COPIES: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for copy in tl.static_range(COPIES):
        place = tl.load(places + token * COPIES + copy).to(tl.int64)
        # Negative where the router chose an expert that does not exist: the token's sum becomes NaN.
        part = tl.load(y + tl.maximum(place, 0) * width + columns, mask=inside, other=0.0).to(tl.float32)
        part = tl.where(place >= 0, part, float("nan"))
        if SCORED:
            part *= tl.load(scores + token * COPIES + copy).to(tl.float32)
        total += part
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weigh(gradient, y, order, scores, of_y, of_scores, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64)
    number = tl.load(order + place)
    score = tl.load(scores + number).to(tl.float32)
    along = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        g = tl.load(gradient + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        along += g * tl.load(y + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_y + place * width + columns, (g * score).to(of_y.dtype.element_ty), mask=inside)
    tl.store(of_scores + number, tl.sum(along))
