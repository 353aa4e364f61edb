"""Which layers go to which piece, if each stage has several pieces."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.timeline import seconds_of

_Cost = tuple[float, float, float]

_ROUNDS = 4
"""Micro-batches per stage that are simulated at most: more only repeat the time of the busiest stage."""


class InterleavedCut:
    """Searches for a cut into pieces with which all stages fit their devices and a step is fast.

    How much a stage keeps of micro-batches in flight follows from the order of its passes.

    Args:
        costs: The costs of the layers.
        stages: The number of stages.
        virtual_stages: The number of pieces on each stage.
    """

    def __init__(self, costs: LayerCosts, stages: int, virtual_stages: int) -> None:
        pieces = stages * virtual_stages
        rows = (costs.seconds, costs.held, costs.retained)
        self._sums = np.array([[0, *itertools.accumulate(row)] for row in rows], dtype=float)
        self._speeds = np.array([[costs.speed_of(piece % stages)] for piece in range(pieces)])
        self._memory = [costs.memory_of(stage) for stage in range(stages)]
        self._plan = interleaved_1f1b(stages, virtual_stages, min(costs.micro_batches, _ROUNDS * stages))
        self._in_flight = [
            np.array(
                _largest(
                    tuple(count + (action.piece // stages == place) for place, count in enumerate(counts))
                    for action, counts in self._plan.held(stage)
                )
            )
            for stage in range(stages)
        ]

    def best(self, *starts: Sequence[int]) -> list[int]:
        """Return the best bounds found by moving layers between pieces, one at a time, while a step gets faster.

        Args:
            starts: Initial bounds of all pieces; the result is from the start that leads to the fastest step.
        """
        return min((self._descended(list(start)) for start in starts), key=operator.itemgetter(0))[1]

    def _descended(self, bounds: list[int]) -> tuple[_Cost, list[int]]:
        (cost,) = self._costs([bounds])
        while moved := _moves(bounds):
            found = self._costs(moved)
            least = min(range(len(moved)), key=found.__getitem__)
            if found[least] >= cost:
                break
            cost, bounds = found[least], moved[least]
        return cost, bounds

    def _costs(self, cuts: Sequence[Sequence[int]]) -> list[_Cost]:
        """Return for each cut the bytes over the limit, the simulated time of a step, and how uneven the pieces are."""
        seconds, held, retained = np.diff(self._sums[:, np.array(cuts).T], axis=1)
        seconds = seconds / self._speeds
        excess = np.zeros(len(cuts))
        for stage, (memory, in_flight) in enumerate(zip(self._memory, self._in_flight, strict=True)):
            of_stage = slice(stage, None, len(self._memory))
            most = (in_flight @ retained[of_stage]).max(axis=0)
            excess = np.maximum(excess, held[of_stage].sum(axis=0) + most - memory)
        steps = seconds_of(self._plan, seconds / 3, seconds * 2 / 3)
        uneven = (seconds**2).sum(axis=0)
        return [*zip(excess.tolist(), _rounded(steps), _rounded(uneven), strict=True)]


def _moves(bounds: Sequence[int]) -> list[list[int]]:
    """Return all cuts with one layer less in a piece and one more in another; the pieces between them shift along."""
    found = []
    for first, last in itertools.combinations_with_replacement(range(1, len(bounds) - 1), 2):
        for by in (-1, 1):
            moved = [bound + by * (first <= place <= last) for place, bound in enumerate(bounds)]
            if moved[first] > moved[first - 1] and moved[last] < moved[last + 1]:
                found.append(moved)
    return found


def _rounded(sums: npt.NDArray[np.float64]) -> list[float]:
    """Round to nine significant digits, since sums of the same numbers can differ by rounding."""
    return [float(f"{each:.9g}") for each in sums]


def _largest(rows: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the rows that no other row equals or exceeds in every place; the others cannot be the peak."""
    kept = set(rows)
    return [row for row in kept if not any(row != other and all(map(operator.le, row, other)) for other in kept)]
