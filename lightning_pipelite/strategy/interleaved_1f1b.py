"""The interleaved 1F1B schedule.

With ``virtual_stages`` V, each of p ranks holds V pieces of the model, and a micro-batch goes round the ranks V times.
At its start and end the pipeline then idles for the time of p - 1 pieces rather than p - 1 stages (Narayanan et al.,
2021, https://arxiv.org/abs/2104.04473, section 2.3). With V = 1 this is plain 1F1B.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache

from lightning_pipelite.strategy.schedule import Action, Schedule


@lru_cache(maxsize=64)
def interleaved_1f1b(ranks: int, virtual_stages: int, micro_batches: int, training: bool = True) -> Schedule:
    """Return the schedule of a step.

    Micro-batches go through the pieces in groups: a rank runs a group through its first piece, then through its next,
    and so on; backward passes go through its pieces in reverse order, each as soon as it can. A group has at least as
    many micro-batches as there are ranks, if the step has that many, so that its first micro-batch is back when its
    last has passed; the groups are as equal as possible. A rank holds at most ``2 (p - r - 1) + (V - 1) g + 1`` passes
    between forward and backward, for rank r and groups of g. If passes take the same time everywhere, the ranks idle
    no longer than the first micro-batch takes to reach the last rank and return.

    Args:
        ranks: The number of ranks, p.
        virtual_stages: The number of pieces on each rank, V.
        micro_batches: The number of micro-batches of the step; any number.
        training: Whether there are backward passes; if not, these are the forward passes of an evaluation.
    """
    groups = _groups(ranks, micro_batches)
    forward = [list(_in_order(groups, range(rank, ranks * virtual_stages, ranks))) for rank in range(ranks)]
    if not training:
        return Schedule(virtual_stages, micro_batches, tuple(tuple(Action(*at) for at in order) for order in forward))
    backward = [list(_in_order(groups, range(rank, ranks * virtual_stages, ranks)[::-1])) for rank in range(ranks)]
    largest = max(groups)
    held = [2 * (ranks - rank - 1) + (virtual_stages - 1) * largest + 1 for rank in range(ranks)]
    if virtual_stages == 1:
        held = [ranks - rank for rank in range(ranks)]
    plan = Schedule(virtual_stages, micro_batches, ((),) * ranks)
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    done: dict[Action, int] = {}
    waiting = [(deque(forward[r]), deque(backward[r])) for r in range(ranks)]
    free = [0] * ranks
    moments = [0]

    def ready(action: Action, now: int) -> bool:
        source = plan.source(action)
        return source is None or done.get(source, now + 1) <= now

    while moments:
        now = heapq.heappop(moments)
        for rank, (ahead, back) in enumerate(waiting):
            if free[rank] > now:
                continue
            first = Action(*ahead[0]) if ahead else None
            last = Action(*back[0], backward=True) if back else None
            in_flight = len(back) - len(ahead)
            can_go = first is not None and in_flight < held[rank] and ready(first, now)
            can_return = last is not None and ready(last, now)
            turns = not orders[rank] or not orders[rank][-1].backward
            if can_return and (turns or not can_go):
                assert last is not None
                back.popleft()
                action, lasts = last, 2
            elif can_go:
                assert first is not None
                ahead.popleft()
                action, lasts = first, 1
            else:
                continue
            orders[rank].append(action)
            done[action] = free[rank] = now + lasts
            heapq.heappush(moments, now + lasts)
    return Schedule(virtual_stages, micro_batches, tuple(map(tuple, orders)))


def _groups(ranks: int, micro_batches: int) -> list[int]:
    count = max(1, micro_batches // ranks)
    return [micro_batches // count + (number < micro_batches % count) for number in range(count)]


def _in_order(groups: Sequence[int], pieces: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in groups:
        for piece in pieces:
            yield from ((piece, number) for number in range(start, start + size))
        start += size
