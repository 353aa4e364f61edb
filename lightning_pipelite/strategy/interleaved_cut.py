"""Which layers go to which piece, where each stage has several."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.timeline import simulate

_Cost = tuple[float, float, float]

_ROUNDS = 4
"""Micro-batches for each stage that are simulated at most: more of them only repeat what the busiest stage takes."""


class InterleavedCut:
    """Finds a cut into pieces with which a step is fast, where all stages fit their device.

    What a stage keeps of micro-batches in flight is what the order of its passes says.

    Args:
        costs: Of the layers.
        stages: Of the pipeline.
        virtual_stages: Pieces of each.
    """

    def __init__(self, costs: LayerCosts, stages: int, virtual_stages: int) -> None:
        self._costs, self._stages = costs, stages
        sums = (costs.seconds, costs.held, costs.retained)
        self._seconds, self._held, self._retained = ([0, *itertools.accumulate(row)] for row in sums)
        self._micro_batches = min(costs.micro_batches, _ROUNDS * stages)
        self._plan = interleaved_1f1b(stages, virtual_stages, self._micro_batches)
        self._in_flight = [
            _largest(
                tuple(count + (action.piece // stages == place) for place, count in enumerate(counts))
                for action, counts in self._plan.held(stage)
            )
            for stage in range(stages)
        ]

    def improved(self, bounds: Sequence[int]) -> list[int]:
        """Move layers between pieces, one at a time, as long as a step gets faster.

        First between any two by an estimate, then between neighbours by the simulated step.

        Args:
            bounds: Of all pieces, to begin with.
        """
        found = self._descended(list(bounds), self._estimated, distance=len(bounds))
        return self._descended(found, self._simulated, distance=1 if len(bounds) > 12 else len(bounds))

    def _descended(self, best: list[int], time: Callable[[Sequence[float]], float], distance: int) -> list[int]:
        cost = self._cost(best, time)
        while True:
            moves = ((self._cost(moved, time, cost[0]), moved) for moved in self._moves(best, distance))
            found = min(moves, default=(cost, best))
            if found[0] >= cost:
                return best
            cost, best = found

    def _moves(self, bounds: list[int], distance: int) -> Iterator[list[int]]:
        """Yield a layer from one piece to another: the pieces between them move along."""
        for first, last in itertools.combinations_with_replacement(range(1, len(bounds) - 1), 2):
            for by in (-1, 1) if last - first < distance else ():
                moved = [bound + by * (first <= place <= last) for place, bound in enumerate(bounds)]
                if moved[first] > moved[first - 1] and moved[last] < moved[last + 1]:
                    yield moved

    def _cost(self, bounds: Sequence[int], time: Callable[[Sequence[float]], float], most: float = math.inf) -> _Cost:
        """Return the bytes that are too many, the time of a step, and how uneven the pieces are.

        Of a cut with more than ``most`` bytes too many, which is no better whatever its time, that is not asked for.
        """
        seconds, held, retained = (
            [row[stop] - row[start] for start, stop in itertools.pairwise(bounds)]
            for row in (self._seconds, self._held, self._retained)
        )
        excess = max(
            sum(held[stage :: self._stages])
            + self._most(stage, retained[stage :: self._stages])
            - self._costs.memory_of(stage)
            for stage in range(self._stages)
        )
        if excess > most:
            return excess, math.inf, math.inf
        seconds = [each / self._costs.speed_of(piece % self._stages) for piece, each in enumerate(seconds)]
        # Sums of the same numbers differ by rounding.
        return max(0.0, excess), float(f"{time(seconds):.9g}"), float(f"{sum(each**2 for each in seconds):.9g}")

    def _estimated(self, seconds: Sequence[float]) -> float:
        """Return what the busiest stage computes, and the slowest piece once for each stage but one, at both ends."""
        busiest = max(sum(seconds[stage :: self._stages]) for stage in range(self._stages))
        return self._micro_batches * busiest + (self._stages - 1) * max(seconds)

    def _simulated(self, seconds: Sequence[float]) -> float:
        forward, backward = ([share * each for each in seconds] for share in (1 / 3, 2 / 3))
        return simulate(self._plan, forward, backward).seconds

    def _most(self, stage: int, retained: Sequence[float]) -> float:
        return max(
            sum(count * size for count, size in zip(counts, retained, strict=True)) for counts in self._in_flight[stage]
        )


def _largest(rows: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the rows of which no other is as large in every place: the others can be no moment that counts."""
    kept = set(rows)
    return [row for row in kept if not any(row != other and all(map(operator.le, row, other)) for other in kept)]
