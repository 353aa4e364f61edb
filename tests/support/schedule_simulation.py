"""What the pipeline's schedule makes of given times of the stages: DeepSpeed's own instructions, played through."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """Seconds that a micro-batch takes on a stage."""

    forward: float
    backward: float


@dataclass
class Simulated:
    """What became of a step.

    Attributes:
        seconds: from the first forward to the last backward.
        busy: the seconds that each stage computed.
    """

    seconds: float
    busy: list[float]

    @property
    def efficiency(self) -> float:
        """The share of all stages' time that was spent on computing."""
        return sum(self.busy) / (len(self.busy) * self.seconds)


@dataclass
class _Rank:
    instructions: deque[Any]
    clock: float = 0.0
    busy: float = 0.0
    sent: list[deque[float]] = field(default_factory=lambda: [deque(), deque()])  # to the stage before, after


def simulate(stages: Sequence[Stage], micro_batches: int, transfer: float = 0.0, blocking: bool = False) -> Simulated:
    """Play a step through.

    Args:
        stages: in order.
        micro_batches: how many.
        transfer: seconds from one stage to the next, and back.
        blocking: a sender goes on only when the receiver has what it sends (NCCL's sends in the stream of the
            kernels); otherwise at once.
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
            raise RuntimeError("the schedule is in a deadlock")
    return Simulated(max(rank.clock for rank in ranks), [rank.busy for rank in ranks])


def _advance(ranks: list[_Rank], number: int, stage: Stage, transfer: float, blocking: bool) -> bool:
    """Run the next instruction of a rank if it can be run."""
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
            return False  # the receiver takes both on
        rank.sent[1 if name == "SendActivation" else 0].append(rank.clock + transfer)
    rank.instructions.popleft()
    return True
