"""When each pass of a schedule runs, and how long the ranks idle, given the times of the passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_pipelite.strategy.schedule import Action, Schedule


@dataclass(frozen=True)
class Timeline:
    """The course of a simulated step.

    Attributes:
        seconds: From the start of the first pass to the end of the last.
        busy: Seconds that each rank computed.
        in_flight: The most pairs of piece and micro-batch that each rank held between forward and backward.
        ends: When each pass ended, in seconds.
    """

    seconds: float
    busy: tuple[float, ...]
    in_flight: tuple[int, ...]
    ends: dict[Action, float]

    @property
    def efficiency(self) -> float:
        """The fraction of all ranks' time that was spent computing."""
        return sum(self.busy) / (len(self.busy) * self.seconds)


def simulate(
    schedule: Schedule, forward: Sequence[float], backward: Sequence[float], transfer: float = 0.0
) -> Timeline:
    """Play a schedule through with given times; transfers overlap with the computation.

    Args:
        schedule: The passes in order.
        forward: Seconds of a micro-batch's forward pass through each piece.
        backward: Seconds of its backward pass.
        transfer: Seconds from one rank to another.
    """
    clocks, busy, held, peak = ([0.0] * schedule.ranks for _ in range(4))
    ends: dict[Action, float] = {}
    for rank, action, source in _in_turn(schedule):
        arrival = 0.0 if source is None else ends[source] + transfer * schedule.comes_from_afar(action)
        seconds = (backward if action.backward else forward)[action.piece]
        ends[action] = clocks[rank] = max(clocks[rank], arrival) + seconds
        busy[rank] += seconds
        held[rank] += -1 if action.backward else 1
        peak[rank] = max(peak[rank], held[rank])
    return Timeline(max(clocks), tuple(busy), tuple(int(count) for count in peak), ends)


def seconds_of(
    schedule: Schedule, forward: npt.NDArray[np.float64], backward: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the seconds of a step as :func:`simulate` does without transfers, for many cuts at once.

    Args:
        schedule: The passes in order.
        forward: Seconds of a micro-batch's forward pass, of shape (pieces, cuts).
        backward: Seconds of its backward pass, of the same shape.
    """
    clocks = [np.zeros(forward.shape[1:])] * schedule.ranks
    ends: dict[Action, npt.NDArray[np.float64]] = {}
    for rank, action, source in _in_turn(schedule):
        # The result of each pass goes to only one other.
        begins = clocks[rank] if source is None else np.maximum(clocks[rank], ends.pop(source))
        ends[action] = clocks[rank] = begins + (backward if action.backward else forward)[action.piece]
    return np.max(clocks, axis=0)


def _in_turn(schedule: Schedule) -> Iterator[tuple[int, Action, Action | None]]:
    """Yield the passes with their ranks and sources, each after its source and the passes before it on its rank."""
    places = [0] * schedule.ranks
    passed: set[Action] = set()
    while any(place < len(order) for place, order in zip(places, schedule.orders, strict=True)):
        before = list(places)
        for rank, order in enumerate(schedule.orders):
            for action in order[places[rank] :]:
                source = schedule.source(action)
                if source is not None and source not in passed:
                    break
                yield rank, action, source
                passed.add(action)
                places[rank] += 1
        if places == before:
            raise RuntimeError("the schedule deadlocks")
