"""Automatic partitions come close to the best of all possible cuts in the simulated schedule."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.partition import partition
from lightning_pipelite.strategy.timeline import seconds_of, simulate


class Layers:
    """Layers with given costs."""

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


def excess(costs: LayerCosts, bounds: Sequence[int], stages: int, pieces: int) -> float:
    """Return the most bytes by which a stage exceeds its memory, with what its passes retain in their order."""
    held, retained = parts(costs.held, bounds), parts(costs.retained, bounds)
    most = []
    for stage, order in enumerate(interleaved_1f1b(stages, pieces, costs.micro_batches).orders):
        level, peak = 0.0, 0.0
        for action in order:
            level += -retained[action.piece] if action.backward else retained[action.piece]
            peak = max(peak, level)
        memory = costs.memory[stage] if isinstance(costs.memory, list) else costs.memory or math.inf
        most.append(sum(held[stage::stages]) + peak - memory)
    return max(most)


def seconds(costs: LayerCosts, bounds: Sequence[int], stages: int, pieces: int) -> float:
    times = parts(costs.seconds, bounds)
    if costs.speeds:
        times = [time / costs.speeds[piece % stages] for piece, time in enumerate(times)]
    plan = interleaved_1f1b(stages, pieces, costs.micro_batches)
    return simulate(plan, [time / 3 for time in times], [2 * time / 3 for time in times]).seconds


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_step_is_about_as_fast_as_by_the_best_of_all_cuts(seed: int, unequal: bool, pieces: int) -> None:
    drawn = random.Random(seed)
    stages = drawn.choice([2, 3])
    number = stages * pieces + drawn.randint(0, 4)
    costs = LayerCosts(
        [drawn.choice([1, 1, 1, 1.5, 2]) for _ in range(number - 1)] + [1 + drawn.choice([0, 1, 2.5])],
        [3] * number,
        [drawn.choice([1, 2]) for _ in range(number)],
        drawn.choice([2, 4, 7] if pieces > 1 else [8, 16]),  # one piece per stage: only the slowest stage counts
        drawn.choice([None, 14 + 4 * number, 10 + 3 * number]),
    )
    if unequal:
        sizes = (
            None if costs.memory is None else [int(costs.memory * drawn.choice([0.7, 1, 1.3])) for _ in range(stages)]
        )
        costs = replace(costs, memory=sizes, speeds=[drawn.choice([0.5, 0.8, 1]) for _ in range(stages)])
    cuts = [(0, *cut, number) for cut in itertools.combinations(range(1, number), stages * pieces - 1)]
    found = partition(Layers(costs), stages, "auto", pieces)
    fitting = [cut for cut in cuts if excess(costs, cut, stages, pieces) <= 0]
    if not fitting:
        least = min(excess(costs, cut, stages, pieces) for cut in cuts)
        assert excess(costs, found, stages, pieces) <= least + 2
        return
    assert excess(costs, found, stages, pieces) <= 0
    best = min(seconds(costs, cut, stages, pieces) for cut in fitting)
    assert seconds(costs, found, stages, pieces) <= 1.05 * best


def test_a_heavy_end_gives_its_stage_fewer_layers() -> None:
    costs = LayerCosts([1.0] * 31 + [2.8], [1] * 32, [1] * 32, 4)
    bounds = partition(Layers(costs), 2, "auto", 2)
    uniform = partition(Layers(costs), 2, "uniform", 2)
    assert uniform == [0, 8, 16, 24, 32]
    assert bounds[4] - bounds[3] < 8
    assert seconds(costs, bounds, 2, 2) < 0.95 * seconds(costs, uniform, 2, 2)


def test_in_many_pieces_no_layer_in_another_piece_makes_the_step_faster() -> None:
    """Layers may also move to a piece that is not a neighbour; the pieces in between then shift along."""
    stages, pieces = 4, 4
    costs = LayerCosts([1.4] + [1.0] * 30 + [3.3], [1] * 32, [1] * 32, 4)
    bounds = partition(Layers(costs), stages, "auto", pieces)
    found = seconds(costs, bounds, stages, pieces)
    for taken, given in itertools.permutations(range(stages * pieces), 2):
        sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
        sizes[taken] -= 1
        sizes[given] += 1
        if sizes[taken]:
            assert found <= seconds(costs, [0, *itertools.accumulate(sizes)], stages, pieces) * (1 + 1e-9)


@pytest.mark.parametrize(("stages", "pieces", "micro_batches"), [(2, 3, 5), (4, 2, 4), (3, 1, 7)])
def test_many_cuts_at_once_take_as_long_as_each_alone(stages: int, pieces: int, micro_batches: int) -> None:
    drawn = random.Random(0)
    plan = interleaved_1f1b(stages, pieces, micro_batches)
    forward, backward = ([[drawn.uniform(1, 3) for _ in range(5)] for _ in range(stages * pieces)] for _ in range(2))
    alone = [
        simulate(plan, *columns).seconds
        for columns in zip(zip(*forward, strict=True), zip(*backward, strict=True), strict=True)
    ]
    assert seconds_of(plan, np.array(forward), np.array(backward)).tolist() == pytest.approx(alone, rel=1e-12)
