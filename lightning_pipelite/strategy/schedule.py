"""The order in which the ranks of a pipeline work off the pieces of a model: interleaved 1F1B.

With ``virtual_stages`` V, each of p ranks holds V pieces of the model, and a micro-batch goes round the ranks V times.
What the pipeline idles at its start and end is then the time of p - 1 pieces rather than of p - 1 stages (Narayanan
et al., 2021, https://arxiv.org/abs/2104.04473, section 2.3). With V = 1 this is plain 1F1B.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

Way = tuple[int, int, bool]
"""From which rank of a pipeline to which, and whether gradients travel."""


@dataclass(frozen=True)
class Action:
    """A pass of a micro-batch through a piece.

    Attributes:
        piece: Number of the piece in the model's order; it is on rank ``piece % ranks``.
        micro_batch: Number of the micro-batch in the step.
        backward: Whether it is the backward pass.
    """

    piece: int
    micro_batch: int
    backward: bool = False


@dataclass(frozen=True)
class Instruction:
    """What a rank does next.

    Attributes:
        name: ``receive`` (start to receive what the pass needs from another rank), ``compute`` (run the pass, once
            that is here) or ``send`` (start to send its result). Only ``compute`` may wait.
        action: The pass that is computed, whose input is received, or whose result is sent.
    """

    name: str
    action: Action


@dataclass(frozen=True)
class Timeline:
    """What became of a step.

    Attributes:
        seconds: From the first pass to the end of the last.
        busy: Seconds that each rank computed.
        in_flight: How many pairs of piece and micro-batch each rank held at most between forward and backward.
        ends: When each pass ended, in seconds.
    """

    seconds: float
    busy: tuple[float, ...]
    in_flight: tuple[int, ...]
    ends: dict[Action, float]

    @property
    def efficiency(self) -> float:
        """The share of all ranks' time that was spent on computing."""
        return sum(self.busy) / (len(self.busy) * self.seconds)


@dataclass(frozen=True)
class Schedule:
    """The passes of every rank in order.

    Attributes:
        virtual_stages: The number of pieces on each rank.
        micro_batches: The number of micro-batches of the step.
        orders: For each rank its passes.
    """

    virtual_stages: int
    micro_batches: int
    orders: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return len(self.orders)

    @property
    def pieces(self) -> int:
        """The number of pieces over all ranks."""
        return self.ranks * self.virtual_stages

    def source(self, action: Action) -> Action | None:
        """Return the pass whose result the pass needs, None if it begins with the data."""
        piece, last = action.piece, self.pieces - 1
        if not action.backward:
            return Action(piece - 1, action.micro_batch) if piece > 0 else None
        return (
            Action(piece + 1, action.micro_batch, backward=True) if piece < last else Action(last, action.micro_batch)
        )

    def comes_from_afar(self, action: Action) -> bool:
        """Whether what the pass needs is made by another rank."""
        source = self.source(action)
        return source is not None and (source.piece - action.piece) % self.ranks != 0

    def held(self, rank: int) -> Iterator[tuple[Action, tuple[int, ...]]]:
        """Each pass of a rank, and how many micro-batches each of its pieces holds then, beside the pass's own."""
        counts = [0] * self.virtual_stages
        for action in self.orders[rank]:
            place = action.piece // self.ranks
            counts[place] -= action.backward
            yield action, tuple(counts)
            counts[place] += not action.backward

    def program(self, rank: int, ahead: int = 1) -> list[Instruction]:
        """Return what a rank does, transfers included.

        A rank starts to receive what its next passes need before it computes the present one, and never waits for
        what it sends. What two ranks send each other in one direction arrives in the order in which it is sent, so it
        is received in that order too; for this a receipt can come earlier than its pass needs it, never later.

        Args:
            rank: The rank.
            ahead: How many passes ahead of their use inputs are received; so many buffers are held beside those in use.
        """
        order = self.orders[rank]
        arrivals = {edge: deque(inputs) for edge, inputs in self._arrivals(rank).items()}
        edges = {action: edge for edge, inputs in arrivals.items() for action in inputs}
        to_come = set(edges)
        program: list[Instruction] = []
        for number, action in enumerate(order):
            for needed in order[number : number + 1 + ahead]:
                while needed in to_come:
                    arrival = arrivals[edges[needed]].popleft()
                    to_come.remove(arrival)
                    program.append(Instruction("receive", arrival))
            program.append(Instruction("compute", action))
            if self._target(action) is not None:
                program.append(Instruction("send", action))
        return program

    def check(self, ahead: int = 1) -> None:
        """Play all programs through, where a transfer needs both ends and those of one direction keep their order.

        Raises:
            RuntimeError: If a pass is missing or runs twice, on a wrong rank, or if the ranks wait for each other.
        """
        wanted = {
            Action(piece, number, backward)
            for piece in range(self.pieces)
            for number in range(self.micro_batches)
            for backward in {a.backward for order in self.orders for a in order}
        }
        given = [action for order in self.orders for action in order]
        misplaced = [a for rank, order in enumerate(self.orders) for a in order if a.piece % self.ranks != rank]
        if len(given) != len(wanted) or set(given) != wanted or misplaced:
            raise RuntimeError("the schedule does not run every pass once, on the rank of its piece")
        programs = [deque(self.program(rank, ahead)) for rank in range(self.ranks)]
        sent: dict[Way, deque[Action]] = {}
        received: dict[Way, deque[Action]] = {}
        here: set[Action] = set()
        done: set[Action] = set()
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(programs):
                while program and not (
                    program[0].name == "compute"
                    and self.comes_from_afar(program[0].action)
                    and program[0].action not in here
                ):
                    instruction = program.popleft()
                    moved = True
                    if instruction.name == "compute":
                        done.add(instruction.action)
                    if instruction.name == "receive":
                        received.setdefault(self.way(instruction.action), deque()).append(instruction.action)
                    elif instruction.name == "send":
                        target = self._target(instruction.action)
                        assert target is not None
                        sent.setdefault(self.way(target), deque()).append(target)
                    elif not self.comes_from_afar(instruction.action):
                        source = self.source(instruction.action)
                        if source is not None and source not in done:
                            raise RuntimeError(f"rank {rank} would run {instruction.action} before {source}")
            for edge, posted in received.items():
                while posted and sent.get(edge):
                    if posted[0] != sent[edge][0]:
                        raise RuntimeError(f"{posted[0]} is to be received where {sent[edge][0]} is sent")
                    here.add(posted.popleft())
                    sent[edge].popleft()
                    moved = True
        stuck = [(rank, program[0]) for rank, program in enumerate(programs) if program]
        if stuck or any(sent.values()) or any(received.values()):
            raise RuntimeError(f"the ranks wait for each other: {stuck}")

    def _target(self, action: Action) -> Action | None:
        """Return the pass on another rank that needs the result of this one."""
        following = Action(action.piece + (-1 if action.backward else 1), action.micro_batch, action.backward)
        inside = 0 <= following.piece < self.pieces
        return following if inside and self.comes_from_afar(following) else None

    def way(self, action: Action) -> Way:
        """Between which ranks the input of a pass travels, and whether it is a gradient."""
        source = self.source(action)
        assert source is not None
        return source.piece % self.ranks, action.piece % self.ranks, action.backward

    def _arrivals(self, rank: int) -> dict[Way, list[Action]]:
        """Return what arrives at a rank by each way, in the order in which it is sent."""
        arrivals: dict[Way, list[Action]] = {}
        for order in self.orders:
            for action in order:
                target = self._target(action)
                if target is not None and target.piece % self.ranks == rank:
                    arrivals.setdefault(self.way(target), []).append(target)
        return arrivals


@lru_cache(maxsize=64)
def interleaved_1f1b(ranks: int, virtual_stages: int, micro_batches: int, training: bool = True) -> Schedule:
    """Return the schedule of a step.

    Micro-batches go through the pieces in groups: a rank runs a group through its first piece, then through its next,
    and so on. A group has at least as many micro-batches as there are ranks, if the step has, so that the first of them
    is back when its last has passed; the groups are as equal as can be. A rank runs backward as soon as it can where it
    ran forward last, and holds at most ``2 (p - r - 1) + (V - 1) g + 1`` passes between forward and backward, for rank
    r and groups of g. With passes that take the same time everywhere, the ranks idle no longer than for the first pass
    to reach the last rank, and back.

    Args:
        ranks: The number of ranks p.
        virtual_stages: The number of pieces on each, V.
        micro_batches: Of the step; any number.
        training: Whether there are backward passes; without, the forward passes of an evaluation.
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


def simulate(
    schedule: Schedule, forward: Sequence[float], backward: Sequence[float], transfer: float = 0.0
) -> Timeline:
    """Play a schedule through with given times; transfers run beside the computation.

    Args:
        schedule: The passes in order.
        forward: Seconds of a micro-batch's forward pass through each piece.
        backward: Seconds of its backward pass.
        transfer: Seconds from one rank to another.
    """
    clocks, busy, held, peak = ([0.0] * schedule.ranks for _ in range(4))
    places = [0] * schedule.ranks
    ends: dict[Action, float] = {}
    while any(place < len(order) for place, order in zip(places, schedule.orders, strict=True)):
        before = list(places)
        for rank, order in enumerate(schedule.orders):
            while places[rank] < len(order):
                action = order[places[rank]]
                source = schedule.source(action)
                if source is not None and source not in ends:
                    break
                arrival = 0.0 if source is None else ends[source] + transfer * schedule.comes_from_afar(action)
                seconds = (backward if action.backward else forward)[action.piece]
                clocks[rank] = max(clocks[rank], arrival) + seconds
                busy[rank] += seconds
                held[rank] += -1 if action.backward else 1
                peak[rank] = max(peak[rank], held[rank])
                ends[action] = clocks[rank]
                places[rank] += 1
        if places == before:
            raise RuntimeError("the schedule is in a deadlock")
    return Timeline(max(clocks), tuple(busy), tuple(int(count) for count in peak), ends)


def _groups(ranks: int, micro_batches: int) -> list[int]:
    count = max(1, micro_batches // ranks)
    return [micro_batches // count + (number < micro_batches % count) for number in range(count)]


def _in_order(groups: Sequence[int], pieces: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in groups:
        for piece in pieces:
            yield from ((piece, number) for number in range(start, start + size))
        start += size
