"""Products of rows in groups, each group with a matrix of its own: the tokens of every expert with its weights.

Rows lie sorted by their group, [rows, .]; a group may have none, or all. How long groups are is known to the GPU alone,
so the work is dealt out in tiles of a few rows, of which a table says where they are (:mod:`.routing`); there is room
in it for the most tiles that there can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import runs_triton


class Groups(NamedTuple):
    """Where the rows of each group are.

    Attributes:
        order: Int32 [rows], which of all copies each is: token · copies + number.
        places: Int32 [tokens, copies], where the copies went: the other way round.
        bounds: Int32 [groups + 1], where each group begins, then the end.
        tiles: Int32 [2, most tiles], the group of each tile, -1 if there is none, and its first row.
    """

    order: Tensor
    places: Tensor
    bounds: Tensor
    tiles: Tensor

    @property
    def number(self) -> int:
        """The number of groups."""
        return self.bounds.shape[0] - 1

    @property
    def copies(self) -> int:
        """How many copies a token has: as many as experts that it goes to."""
        return self.places.shape[1]


class Shape(NamedTuple):
    """How a kernel cuts up its work: columns and depth of a tile, warps, and loads in flight."""

    columns: int
    depth: int
    warps: int
    stages: int


MOST_ROWS = 128
ADDED_DEPTH = 64  # of the products that are added, at most at once


def rows_of_tile(rows: int, groups: int) -> int:
    """Return how many rows a tile has: about as many as a group, of which the last tile is part empty."""
    return min(MOST_ROWS, at_least_16(max(1, rows // groups)))


def grouped_product(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    *,
    gather: bool = False,
    left: Tensor | None = None,
    right: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``x Wₑᵀ + left Rₑᵀ + biasₑ`` for the rows of each group e, summed in float32 and rounded once.

    Args:
        x: [rows, in]; or, with ``gather``, [tokens, in], whose copies the rows are.
        weight: W [groups, out, in] of x's dtype, with any strides.
        groups: Where the rows are.
        gather: Whether rows are yet to be taken from ``x``.
        left: [rows, few].
        right: R [groups, out, few], with any strides.
        bias: [groups, out].

    Returns:
        [rows, out], in x's dtype.
    """
    if _is_traced(x):
        return _product_by_triton(x, weight, groups, gather, left, right, bias)
    return torch.ops.pipelite.grouped_product(x, weight, list(groups), gather, left, right, bias)


def grouped_outer(
    u: Tensor, v: Tensor, groups: Groups, *, gather: bool = False, scores: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Return ``scale · Σ v uᵀ`` over the rows of each group, in at least float32: [groups, width of v, width of u].

    Args:
        u: [rows, few].
        v: [rows, width]; or, with ``gather``, [tokens, width].
        groups: Where the rows are.
        gather: Whether v's rows are yet to be taken.
        scores: [tokens, copies], what each row of u is first multiplied with, and rounded; 1 if not given.
        scale: What the sums are multiplied with.
    """
    if _is_traced(u):
        return _outer_by_triton(u, v, groups, gather, scores, scale)
    return torch.ops.pipelite.grouped_outer(u, v, list(groups), gather, scores, scale)


def sum_copies(y: Tensor, groups: Groups, scores: Tensor | None = None) -> Tensor:
    """Return, for each token, the sum of its rows of ``y``, each times its score, added in at least float32.

    Args:
        y: [rows, width].
        groups: Where the rows are.
        scores: [tokens, copies], of any floating dtype, without gaps; all are 1 if not given.

    Returns:
        [tokens, width], in y's dtype.
    """
    if _is_traced(y):
        return _sum_by_triton(y, groups, scores)
    return torch.ops.pipelite.sum_copies(y, list(groups), scores)


def weigh(gradient: Tensor, y: Tensor, groups: Groups, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``y`` and of scores [tokens, copies], where ``gradient`` is that of y times its score.

    Args:
        gradient: [rows, width].
        y: [rows, width].
        groups: Where the rows are.
        scores: [tokens, copies], without gaps.
    """
    if _is_traced(y):
        return _weigh_by_triton(gradient, y, groups, scores)
    return torch.ops.pipelite.weigh(gradient, y, list(groups), scores)


def _is_traced(tensor: Tensor) -> bool:
    """Whether the compiler looks on: it launches kernels itself, in half the time; operations it would only call."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and torch.compiler.is_compiling()


def _by_triton(tensor: Tensor) -> bool:
    return runs_triton(tensor) and not tensor.is_meta and tensor.dtype != torch.float64


_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define(
    "grouped_product(Tensor x, Tensor weight, Tensor[] groups, bool gather, Tensor? left, Tensor? right, Tensor? bias) "
    "-> Tensor"
)
_LIBRARY.define(
    "grouped_outer(Tensor u, Tensor v, Tensor[] groups, bool gather, Tensor? scores, float scale) -> Tensor"
)
_LIBRARY.define("sum_copies(Tensor y, Tensor[] groups, Tensor? scores) -> Tensor")
_LIBRARY.define("weigh(Tensor gradient, Tensor y, Tensor[] groups, Tensor scores) -> (Tensor, Tensor)")


@torch.library.register_fake("pipelite::grouped_product", lib=_LIBRARY)
def _(
    x: Tensor,
    weight: Tensor,
    groups: list[Tensor],
    gather: bool,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(groups[0].shape[0], weight.shape[1])


@torch.library.impl(_LIBRARY, "grouped_product", "CompositeExplicitAutograd")
def product_operation(
    x: Tensor,
    weight: Tensor,
    groups: list[Tensor],
    gather: bool,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Multiply each group's rows of x by its weights, as one operation that torch.compile leaves whole."""
    where = Groups(*groups)
    if _by_triton(x):
        return _product_by_triton(x, weight, where, gather, left, right, bias)
    rows = where.order.shape[0]
    if x.is_meta:  # the shapes of a product, and what it counts
        taken = x[:1].expand(rows, -1)
        if left is None or right is None:
            return taken @ weight[0].T
        return torch.addmm(left @ right[0].T, taken, weight[0].T)
    out = x.new_empty(rows, weight.shape[1])
    for group, each in _slices(where):
        part = x[where.order[each] // where.copies] if gather else x[each]
        made = part @ weight[group].T
        if left is not None and right is not None:
            made = torch.addmm(made, left[each], right[group].T)
        out[each] = made if bias is None else made + bias[group]
    return out


@torch.library.register_fake("pipelite::grouped_outer", lib=_LIBRARY)
def _(u: Tensor, v: Tensor, groups: list[Tensor], gather: bool, scores: Tensor | None, scale: float) -> Tensor:
    dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(groups[2].shape[0] - 1, v.shape[1], u.shape[1], dtype=dtype)


@torch.library.impl(_LIBRARY, "grouped_outer", "CompositeExplicitAutograd")
def outer_operation(
    u: Tensor, v: Tensor, groups: list[Tensor], gather: bool, scores: Tensor | None, scale: float
) -> Tensor:
    """Sum u's rows times v's over each group, [groups, columns of u, columns of v], as one operation."""
    where = Groups(*groups)
    if _by_triton(u):
        return _outer_by_triton(u, v, where, gather, scores, scale)
    exact = torch.promote_types(u.dtype, torch.float32)
    out = u.new_empty(where.number, v.shape[1], u.shape[1], dtype=exact)
    if u.is_meta:
        v[:1].expand(u.shape[0], -1).T @ u
        return out
    for group, each in _slices(where):
        part = v[where.order[each] // where.copies] if gather else v[each]
        other = u[each].to(exact)
        if scores is not None:
            other = (other * scores.flatten()[where.order[each], None]).to(u.dtype).to(exact)
        out[group] = scale * (part.to(exact).T @ other)
    return out


@torch.library.register_fake("pipelite::sum_copies", lib=_LIBRARY)
def _(y: Tensor, groups: list[Tensor], scores: Tensor | None) -> Tensor:
    return y.new_empty(groups[1].shape[0], y.shape[1])


@torch.library.impl(_LIBRARY, "sum_copies", "CompositeExplicitAutograd")
def sum_operation(y: Tensor, groups: list[Tensor], scores: Tensor | None) -> Tensor:
    """Add the copies of each token, weighed by their scores, as one operation."""
    where = Groups(*groups)
    if _by_triton(y):
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
    """Compute the gradients of :func:`sum_operation`: of y and of the scores, as one operation."""
    where = Groups(*groups)
    if _by_triton(y):
        return _weigh_by_triton(gradient, y, where, scores)
    exact = torch.promote_types(y.dtype, torch.float32)
    if y.is_meta:
        return y.new_empty(y.shape), y.new_empty(scores.shape, dtype=exact)
    along = (gradient.to(exact) * y.to(exact)).sum(1)
    of_y = (gradient.to(exact) * scores.flatten()[where.order, None].to(exact)).to(y.dtype)
    return of_y, along[where.places]


def _product_by_triton(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    gather: bool,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    rows, width, depth = groups.order.shape[0], weight.shape[1], weight.shape[2]
    out = x.new_empty(rows, width)
    assert x.stride(1) == 1
    few = 0 if left is None else left.shape[1]
    generation = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    shape = product_shape(x, width, generation)
    block = rows_of_tile(rows, groups.number)
    columns = -(-width // shape.columns)
    # Where there is none, something else is handed over: a compiled graph takes tensors only.
    l, r, b = (x if each is None else each for each in (left, right, bias))  # noqa: E741
    r_group, r_out, r_few = (0, 0, 0) if right is None else right.stride()
    w_group, w_out, w_in = weight.stride()
    _product[(groups.tiles.shape[1] * columns,)](
        x, x.stride(0), groups.order, weight, w_group, w_out, w_in, l, r, r_group, r_out, r_few, b, out,
        groups.bounds, groups.tiles, groups.tiles.shape[1], width, depth, few, columns,
        COPIES=groups.copies if gather else 0, BIASED=bias is not None,
        ADDED=min(ADDED_DEPTH, at_least_16(few)) if few else 0,
        WHOLE=depth % shape.depth == 0 and width % shape.columns == 0,
        ROWS=block, COLUMNS=shape.columns, DEPTH=shape.depth,
        PRECISION=_precision(x), num_warps=shape.warps if block >= 64 else 4, num_stages=shape.stages,
    )  # fmt: skip
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
        PRECISION=_precision(u), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


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


def _slices(groups: Groups) -> Iterator[tuple[int, slice]]:
    bounds = groups.bounds.tolist()
    yield from ((group, slice(bounds[group], bounds[group + 1])) for group in range(groups.number))


def at_least_16(size: int) -> int:
    """Return the next power of two, of which Triton's products have 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # which means nothing to narrower types


def product_shape(x: Tensor, width: int, generation: int) -> Shape:
    """Return how to cut up products of ``width`` columns on GPUs of a compute capability's first number."""
    if x.element_size() == 4:
        return Shape(min(64, at_least_16(width)), 32, 4, 2)
    if width <= 64:  # what limits it is how soon x is read
        return Shape(at_least_16(width), 128, 4, 3)
    # On an H200, the first product of Qwen3-30B-A3B: 0.46 ms; 0.60 by the other; 0.44 by torch's, without adapters.
    if generation in (9, 10):  # 227 KiB of shared memory
        return Shape(256, 64, 8, 4)
    return Shape(128, 64, 8, 3)  # 64 KiB; the smallest have 99


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, x_stride, order, weight, group_stride, out_stride, in_stride,
    left, right, right_group_stride, right_out_stride, right_few_stride, bias, out,
    bounds, tiles, most_tiles, width, depth, few, columns_count,
    COPIES: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // columns_count
    group = tl.load(tiles + tile)
    if group >= 0:
        first = tl.load(tiles + most_tiles + tile)
        end = tl.load(bounds + group + 1)
        rows = first + tl.arange(0, ROWS)
        there = rows < end
        columns = tl.program_id(0) % columns_count * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        deep = tl.arange(0, DEPTH)
        # Rows that are not there are read from others: what is made of them is not written.
        taken = tl.where(there, rows, first)
        if COPIES > 0:
            taken = tl.load(order + taken) // COPIES
        x_at = x + taken.to(tl.int64)[:, None] * x_stride + deep[None, :]
        w_at = weight + group.to(tl.int64) * group_stride
        w_at += columns.to(tl.int64)[None, :] * out_stride + deep.to(tl.int64)[:, None] * in_stride
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            if WHOLE:
                a = tl.load(x_at)
                b = tl.load(w_at)
            else:
                left_over = depth - start
                a = tl.load(x_at, mask=deep[None, :] < left_over, other=0.0)
                b = tl.load(w_at, mask=(deep[:, None] < left_over) & inside[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            x_at += DEPTH
            w_at += DEPTH * in_stride
        if ADDED > 0:
            thin = tl.arange(0, ADDED)
            for start in range(0, few, ADDED):
                kept = start + thin < few
                l_at = left + rows.to(tl.int64)[:, None] * few + start + thin[None, :]
                r_at = right + group.to(tl.int64) * right_group_stride
                r_at += columns[None, :] * right_out_stride + (start + thin[:, None]) * right_few_stride
                a = tl.load(l_at, mask=there[:, None] & kept[None, :], other=0.0)
                b = tl.load(r_at, mask=kept[:, None] & inside[None, :], other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
        if BIASED:
            at = bias + group.to(tl.int64) * width + columns
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        at = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


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
        # Below zero where the router chose an expert that there is not: what comes of it is no number.
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
