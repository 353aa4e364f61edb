"""Simulates the pipeline's schedule for given times of the stages, from DeepSpeed's own instructions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """Seconds of a micro-batch on a stage."""

    forward: float
    backward: float


@dataclass
class Simulated:
    """The result of a simulated step.

    Attributes:
        seconds: Time from the first forward to the last backward.
        busy: Seconds that each stage computes.
    """

    seconds: float
    busy: list[float]

    @property
    def efficiency(self) -> float:
        """The share of all stages' time that is spent on computing."""
        return sum(self.busy) / (len(self.busy) * self.seconds)


@dataclass
class _Rank:
    instructions: deque[Any]
    clock: float = 0.0
    busy: float = 0.0
    sent: list[deque[float]] = field(default_factory=lambda: [deque(), deque()])  # to the previous and the next stage


def simulate(stages: Sequence[Stage], micro_batches: int, transfer: float = 0.0, blocking: bool = False) -> Simulated:
    """Simulate a step.

    Args:
        stages: The stages in order.
        micro_batches: Number of micro-batches.
        transfer: Seconds of a transfer between neighbouring stages, in either direction.
        blocking: Whether a sender waits until the receiver has the data (as NCCL's sends do in the stream of the
            kernels); otherwise it continues at once.
    """
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    count = len(stages)
    ranks = [
        _Rank(deque(instruction for step in TrainSchedule(micro_batches, count, i) for instruction in step))
        for i in range(count)
    ]
    while any(rank.instructions for rank in ranks):
        moved = [_advance(ranks, i, stages[i], transfer, blocking) for i in range(count)]
        if not any(moved):
            raise RuntimeError("the schedule deadlocks")
    return Simulated(max(rank.clock for rank in ranks), [rank.busy for rank in ranks])


def _advance(ranks: list[_Rank], number: int, stage: Stage, transfer: float, blocking: bool) -> bool:
    """Run the next instruction of a rank if it is ready."""
    rank = ranks[number]
    if not rank.instructions:
        return False
    name = rank.instructions[0].name
    if name in ("ForwardPass", "BackwardPass"):
        seconds = stage.forward if name == "ForwardPass" else stage.backward
        rank.clock += seconds
        rank.busy += seconds
    elif name in ("RecvActivation", "RecvGrad"):
        before = name == "RecvActivation"
        other = ranks[number - 1 if before else number + 1]
        if blocking:
            if not other.instructions or other.instructions[0].name != name.replace("Recv", "Send"):
                return False
            rank.clock = other.clock = max(rank.clock, other.clock) + transfer
            other.instructions.popleft()
        else:
            arrivals = other.sent[1 if before else 0]
            if not arrivals:
                return False
            rank.clock = max(rank.clock, arrivals.popleft())
    elif name in ("SendActivation", "SendGrad"):
        if blocking:
            return False  # the receiver's instruction advances both
        rank.sent[1 if name == "SendActivation" else 0].append(rank.clock + transfer)
    rank.instructions.popleft()
    return True
