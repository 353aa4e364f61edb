"""The search for the longest sequence finds, in few trials, what trying every length finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.longest import find_longest
from lightning_pipelite.planning.planner import MARGIN, STEP, Planner
from lightning_pipelite.planning.stages import CONTEXT, WORKSPACE

CURVES: dict[str, Callable[[int], float]] = {
    "straight": lambda n: 3.0 * n,
    "fullest of two stages": lambda n: max(5000.0 + 2.5 * n, 3.1 * n),
    "bent upwards": lambda n: 3.0 * n + n**2 / 40_000,
    "a parabola": lambda n: n**2 / 1000,
    "blocks": lambda n: 3.0 * n + (-n % 512) / 100,
    "logits in chunks": lambda n: 3.0 * n + 20 * min(n, 1024),
    "nothing below a length": lambda n: max(0.0, 40.0 * (n - 5000)),
}


def searched(excess: Callable[[int], float], tried: int, most: int) -> tuple[int, list[int]]:
    """Return the length that is found and the lengths that were tried."""
    trials = []

    def watched(length: int) -> float:
        trials.append(length)
        return excess(length)

    return find_longest(watched, {0: excess(0), tried: excess(tried)}, most, STEP), trials


@pytest.mark.parametrize("name", list(CURVES))
def test_it_is_what_trying_all_lengths_finds(name: str) -> None:
    def check(room: float, known: int, most: int) -> None:
        def excess(length: int) -> float:
            return CURVES[name](length) - room

        best = max((n for n in range(0, most + 1, STEP) if excess(n) <= 0), default=0)
        found, trials = searched(excess, known, most)
        assert found == best
        assert found == 0 or found in (known, *trials)
        assert len(set(trials)) == len(trials)
        assert all(0 < n <= most and n % STEP == 0 for n in trials)

    rooms = (-1.0, 0.0, 500.0, 12_345.0, 30_000.0, 123_456.0, 1e9)
    for case in itertools.product(rooms, (4096, 1000, 300, 50_000), (8192, 131_072, 100, 10_000)):
        check(*case)


@given(
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 50)), min_size=1, max_size=4),
    st.integers(0, 400_000),
    st.integers(1, 20_000),
)
def test_it_is_so_for_the_fullest_of_any_stages(lines: list[tuple[int, int]], room: int, known: int) -> None:
    def excess(length: int) -> float:
        return max(base + slope * length for base, slope in lines) - room

    best = max((n for n in range(0, 16_385, STEP) if excess(n) <= 0), default=0)
    assert searched(excess, known, 16_384)[0] == best


def test_two_trials_are_enough_on_a_straight_line() -> None:
    found, trials = searched(lambda n: 1000.0 + 3 * n - 20_000, 4096, 131_072)
    assert found == 6144
    assert len(trials) <= 2


@pytest.mark.parametrize("other", [(0.0, 250.0), (1000.0, 290.0), (-40_000.0, 330.0), (0.0, 100.0), (7e6, 0.0)])
@pytest.mark.parametrize("room", [100_000.0, 1_234_567.0, 5_000_000.0])
def test_all_stages_take_the_largest_sequence(other: tuple[float, float], room: float) -> None:
    """Even if the stage that limits the length is not the fullest one at the planned length."""
    static, curves = CONTEXT + WORKSPACE, [(500.0, 300.0), other, (0.0, 10.0)]
    tried = set()

    class Curves(Planner):
        def _stage(
            self, bounds: Sequence[int], number: int, policy: str, sequence_len: int, virtual_stages: int = 1
        ) -> Any:
            tried.add((number, sequence_len))
            base, slope = curves[number]
            total = static + max(0.0, base + slope * sequence_len)
            return SimpleNamespace(weights=0, gradients=0, optimizer=0, total=total)

    meta_model = SimpleNamespace(can_recompute=True, config=SimpleNamespace(max_position_embeddings=16_384))
    simulation: Any = SimpleNamespace(layers=SimpleNamespace(meta_model=meta_model))
    planner = Curves(
        simulation, micro_batches=8, sequence_len=4096, devices=Devices.alike(3, int((static + room) / (1 - MARGIN)))
    )

    def fit(length: int) -> bool:
        return planner.fits(planner.stages([0, 1, 2, 3], "keep", length))

    found = planner.largest_sequence([0, 1, 2, 3], "keep")
    assert found == 0 or all(any(n == number and length >= found for n, length in tried) for number in range(3))
    assert found == max((length for length in range(STEP, 16_385, STEP) if fit(length)), default=0)
