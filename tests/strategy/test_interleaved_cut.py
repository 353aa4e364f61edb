"""Cuts into several pieces a stage, against all cuts that there are, by the simulated schedule."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.partition import partition
from lightning_pipelite.strategy.timeline import simulate


class Layers:
    """Layers that know what they cost."""

    def __init__(self, costs: LayerCosts) -> None:
        self.names = ["L"] * len(costs.seconds)
        self._costs = costs

    def parameter_counts(self) -> list[int]:
        return [1] * len(self.names)

    def build_stage(self, *_: object) -> None: ...

    def layer_costs(self) -> LayerCosts:
        return self._costs


def parts(row: Sequence[float], bounds: Sequence[int]) -> list[float]:
    return [sum(row[start:stop]) for start, stop in itertools.pairwise(bounds)]


def fullest(costs: LayerCosts, bounds: Sequence[int], stages: int, pieces: int) -> float:
    """The bytes of the fullest stage, with what its passes retain, one after the other."""
    held, retained = parts(costs.held, bounds), parts(costs.retained, bounds)
    most = []
    for stage, order in enumerate(interleaved_1f1b(stages, pieces, costs.micro_batches).orders):
        level, peak = 0.0, 0.0
        for action in order:
            level += -retained[action.piece] if action.backward else retained[action.piece]
            peak = max(peak, level)
        most.append(sum(held[stage::stages]) + peak)
    return max(most)


def seconds(costs: LayerCosts, bounds: Sequence[int], stages: int, pieces: int) -> float:
    times = parts(costs.seconds, bounds)
    plan = interleaved_1f1b(stages, pieces, costs.micro_batches)
    return simulate(plan, [time / 3 for time in times], [2 * time / 3 for time in times]).seconds


@pytest.mark.parametrize("seed", range(12))
def test_the_step_is_about_as_fast_as_by_the_best_of_all_cuts(seed: int) -> None:
    drawn = random.Random(seed)
    stages, pieces = drawn.choice([2, 3]), 2
    number = stages * pieces + drawn.randint(0, 4)
    costs = LayerCosts(
        [drawn.choice([1, 1, 1, 1.5, 2]) for _ in range(number - 1)] + [1 + drawn.choice([0, 1, 2.5])],
        [3] * number,
        [drawn.choice([1, 2]) for _ in range(number)],
        drawn.choice([2, 4, 7]),
        drawn.choice([None, 14 + 4 * number, 10 + 3 * number]),
    )
    cuts = [(0, *cut, number) for cut in itertools.combinations(range(1, number), stages * pieces - 1)]
    found = partition(Layers(costs), stages, "auto", pieces)
    limit = float("inf") if costs.memory is None else costs.memory
    fitting = [cut for cut in cuts if fullest(costs, cut, stages, pieces) <= limit]
    if not fitting:
        least = min(fullest(costs, cut, stages, pieces) for cut in cuts)
        assert fullest(costs, found, stages, pieces) <= 1.1 * least
        return
    assert fullest(costs, found, stages, pieces) <= limit
    best = min(seconds(costs, cut, stages, pieces) for cut in fitting)
    assert seconds(costs, found, stages, pieces) <= 1.05 * best


def test_a_heavy_end_gives_its_stage_fewer_layers() -> None:
    costs = LayerCosts([1.0] * 31 + [2.8], [1] * 32, [1] * 32, 4)
    bounds = partition(Layers(costs), 2, "auto", 2)
    uniform = partition(Layers(costs), 2, "uniform", 2)
    assert uniform == [0, 8, 16, 24, 32]
    assert bounds[4] - bounds[3] < 8
    assert seconds(costs, bounds, 2, 2) < 0.95 * seconds(costs, uniform, 2, 2)
