"""Products of grouped rows, each group with its own matrix: the tokens of each expert with its weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import at_least_16, by_triton, is_traced, precision
from lightning_pipelite.kernels.groups import Groups, rows_of_tile, slices_of
from lightning_pipelite.kernels.launch import launch

ADDED_DEPTH = 64  # of a block of the added product left Rᵀ, at most


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
        x: [rows, in]; or, with ``gather``, [tokens, in], of which the rows are copies.
        weight: W [groups, out, in] of x's dtype, with any strides.
        groups: How the rows are grouped.
        gather: Whether to gather the rows from the tokens in ``x``.
        left: [rows, few].
        right: R [groups, out, few], with any strides.
        bias: [groups, out].

    Returns:
        [rows, out], in x's dtype.
    """
    if is_traced(x):
        return _product_by_triton(x, weight, groups, gather, left, right, bias)
    return torch.ops.pipelite.grouped_product(x, weight, list(groups), gather, left, right, bias)


_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define(
    "grouped_product(Tensor x, Tensor weight, Tensor[] groups, bool gather, Tensor? left, Tensor? right, Tensor? bias) "
    "-> Tensor"
)


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
    """Multiply each group's rows of x by its weights, as one operation that is opaque to torch.compile."""
    where = Groups(*groups)
    if by_triton(x):
        return _product_by_triton(x, weight, where, gather, left, right, bias)
    rows = where.order.shape[0]
    if x.is_meta:  # plain products, for the shapes and for counting FLOPs
        taken = x[:1].expand(rows, -1)
        if left is None or right is None:
            return taken @ weight[0].T
        return torch.addmm(left @ right[0].T, taken, weight[0].T)
    out = x.new_empty(rows, weight.shape[1])
    for group, each in slices_of(where):
        part = x[where.order[each] // where.copies] if gather else x[each]
        made = part @ weight[group].T
        if left is not None and right is not None:
            made = torch.addmm(made, left[each], right[group].T)
        out[each] = made if bias is None else made + bias[group]
    return out


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
    # x stands in for an operand that is not given: a compiled graph takes only tensors.
    l, r, b = (x if each is None else each for each in (left, right, bias))  # noqa: E741
    r_group, r_out, r_few = (0, 0, 0) if right is None else right.stride()
    w_group, w_out, w_in = weight.stride()
    launch(
        _product, (groups.tiles.shape[1] * columns, 1, 1),
        x, x.stride(0), groups.order, weight, w_group, w_out, w_in, l, r, r_group, r_out, r_few, b, out,
        groups.bounds, groups.tiles, groups.tiles.shape[1], width, depth, few, columns,
        COPIES=groups.copies if gather else 0, BIASED=bias is not None,
        ADDED=min(ADDED_DEPTH, at_least_16(few)) if few else 0,
        WHOLE=depth % shape.depth == 0 and width % shape.columns == 0,
        ROWS=block, COLUMNS=shape.columns, DEPTH=shape.depth,
        PRECISION=precision(x), num_warps=shape.warps if block >= 64 else 4, num_stages=shape.stages,
    )  # fmt: skip
    return out


class Shape(NamedTuple):
    """How a kernel divides its work: columns and depth of a tile, warps, and loads in flight."""

    columns: int
    depth: int
    warps: int
    stages: int


def product_shape(x: Tensor, width: int, generation: int) -> Shape:
    """Return the tile for products of ``width`` columns on a GPU of compute capability ``generation``.x."""
    if x.element_size() == 4:
        return Shape(min(64, at_least_16(width)), 32, 4, 2)
    if width <= 64:  # bound by reading x
        return Shape(at_least_16(width), 128, 4, 3)
    # On an H200, the first product of Qwen3-30B-A3B: 0.46 ms; 0.60 with the other; 0.44 by torch, without adapters.
    if generation in (9, 10):  # 227 KiB of shared memory
        return Shape(256, 64, 8, 4)
    return Shape(128, 64, 8, 3)  # takes 64 KiB; the smallest GPUs have 99


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
        # Rows past the group's end read the tile's first row instead; their results are not stored.
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
