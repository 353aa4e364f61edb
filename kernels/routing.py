"""Sorts tokens by the experts that they are routed to, entirely on the GPU: the host never learns the counts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import at_least_16, is_traced, runs_triton
from lightning_pipelite.kernels.groups import Groups, rows_of_tile

BLOCK = 128  # choices sorted by one program
WRONG = "a router chose an expert that does not exist"
BLOCKS = 32  # whose counts are added up at once


def sort_by_expert(chosen: Tensor, experts: int) -> Groups:
    """Sort the copies of tokens by expert, stably, and return where each goes.

    Args:
        chosen: Int [tokens, copies], the experts of each token. A number out of range is an error on a CPU; on a GPU,
            where detecting it would need a host synchronisation, its place is -1, and its result NaN.
        experts: The number of experts.
    """
    if is_traced(chosen):
        return Groups(*_sort_by_counting(chosen.contiguous(), experts))
    return Groups(*torch.ops.pipelite.sort_by_expert(chosen, experts))


_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define("sort_by_expert(Tensor chosen, int experts) -> Tensor[]")


def _empty(chosen: Tensor, experts: int) -> list[Tensor]:
    count = chosen.numel()
    room = -(-count // rows_of_tile(count, experts)) + experts
    shapes = ((count,), chosen.shape, (experts + 1,), (2, room))
    return [torch.empty(shape, dtype=torch.int32, device=chosen.device) for shape in shapes]


torch.library.register_fake("pipelite::sort_by_expert", _empty, lib=_LIBRARY)


@torch.library.impl(_LIBRARY, "sort_by_expert", "CompositeExplicitAutograd")
def _sort(chosen: Tensor, experts: int) -> list[Tensor]:
    count = chosen.numel()
    if chosen.is_meta:
        return _empty(chosen, experts)
    if runs_triton(chosen) and count:
        return _sort_by_counting(chosen.contiguous(), experts)
    if count and not 0 <= int(chosen.min()) <= int(chosen.max()) < experts:
        raise IndexError(WRONG)
    order = chosen.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(count, device=order.device)
    lengths = chosen.flatten().bincount(minlength=experts)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = rows_of_tile(count, experts)
    tiles = (lengths + rows - 1) // rows
    group = torch.arange(experts, device=order.device).repeat_interleave(tiles)
    first = bounds[group] + rows * (torch.arange(len(group), device=order.device) - (tiles.cumsum(0) - tiles)[group])
    made = _empty(chosen, experts)
    made[3].fill_(-1)[:, : len(group)] = torch.stack([group, first])
    for tensor, values in zip(made, (order, places.view(chosen.shape), bounds), strict=False):
        tensor.copy_(values)
    return made


def _sort_by_counting(chosen: Tensor, experts: int) -> list[Tensor]:
    order, places, bounds, tiles = made = _empty(chosen, experts)
    count = chosen.numel()
    blocks = -(-count // BLOCK)
    counts = torch.empty(blocks, experts, dtype=torch.int32, device=chosen.device)
    padded = at_least_16(experts)
    _count[(blocks,)](chosen, counts, count, experts, EXPERTS=padded, BLOCK=BLOCK)
    _add_up[(1,)](
        counts, bounds, tiles, blocks, experts, tiles.shape[1],
        EXPERTS=padded, BLOCKS=BLOCKS, ROWS=rows_of_tile(count, experts), num_warps=8,
    )  # fmt: skip
    _place[(blocks,)](chosen, counts, bounds, order, places, count, experts, EXPERTS=padded, BLOCK=BLOCK)
    return made


@triton.jit
def _count(chosen, counts, count, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Count how many choices of each block go to each expert."""
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    all_experts = tl.arange(0, EXPERTS)
    expert = tl.load(chosen + numbers, mask=numbers < count, other=-1).to(tl.int32)
    expert = tl.where(numbers < count, tl.minimum(tl.maximum(expert, 0), experts - 1), -1)
    found = tl.sum((expert[:, None] == all_experts[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * experts + all_experts, found, mask=all_experts < experts)


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    counts, bounds, tiles, blocks, experts, room, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):
    """Replace each block's counts by the sums over earlier blocks; write where each expert begins, and the tiles."""
    all_experts = tl.arange(0, EXPERTS)
    there = all_experts < experts
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, blocks, BLOCKS):
        some = start + tl.arange(0, BLOCKS)
        at = counts + some[:, None] * experts + all_experts[None, :]
        mask = (some < blocks)[:, None] & there[None, :]
        found = tl.load(at, mask=mask, other=0)
        tl.store(at, before[None, :] + tl.cumsum(found, axis=0) - found, mask=mask)
        before += tl.sum(found, axis=0)
    ends = tl.cumsum(before, axis=0)
    begins = ends - before
    tl.store(bounds + all_experts, begins, mask=there)
    tl.store(bounds + experts, tl.sum(before))
    of_each = (before + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(of_each, axis=0)
    for start in range(0, room, BLOCKS):
        tile = start + tl.arange(0, BLOCKS)
        mine = (tile[:, None] >= (tile_ends - of_each)[None, :]) & (tile[:, None] < tile_ends[None, :])
        group = tl.sum(tl.where(mine, all_experts[None, :] + 1, 0), axis=1) - 1
        first = begins[None, :] + ROWS * (tile[:, None] - (tile_ends - of_each)[None, :])
        tl.store(tiles + tile, group, mask=tile < room)
        tl.store(tiles + room + tile, tl.sum(tl.where(mine, first, 0), axis=1), mask=tile < room)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    chosen, counts, bounds, order, places, count, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < count
    all_experts = tl.arange(0, EXPERTS)
    there = all_experts < experts
    given = tl.load(chosen + numbers, mask=inside, other=-1).to(tl.int32)
    expert = tl.where(inside, tl.minimum(tl.maximum(given, 0), experts - 1), -1)
    mine = (expert[:, None] == all_experts[None, :]).to(tl.int32)
    earlier = tl.load(counts + tl.program_id(0) * experts + all_experts, mask=there, other=0)
    earlier += tl.load(bounds + all_experts, mask=there, other=0)
    place = tl.sum(mine * (tl.cumsum(mine, axis=0) - 1 + earlier[None, :]), axis=1)
    tl.store(places + numbers, tl.where(given == expert, place, -1), mask=inside)
    tl.store(order + place, numbers, mask=inside)
