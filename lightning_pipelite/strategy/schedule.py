"""The order in which the ranks of a pipeline run the pieces of a model, and what they send each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

Way = tuple[int, int, bool]
"""The sending and the receiving rank of a pipeline, and whether gradients are sent."""


@dataclass(frozen=True)
class Action:
    """A pass of a micro-batch through a piece.

    Attributes:
        piece: The number of the piece in the model's order; it is on rank ``piece % ranks``.
        micro_batch: The number of the micro-batch in the step.
        backward: Whether it is the backward pass.
    """

    piece: int
    micro_batch: int
    backward: bool = False


@dataclass(frozen=True)
class Instruction:
    """What a rank does next.

    Attributes:
        name: ``receive`` (start receiving what the pass needs from another rank), ``compute`` (run the pass, once that
            has arrived) or ``send`` (start sending its result). Only ``compute`` may wait.
        action: The pass that is computed, whose input is received, or whose result is sent.
    """

    name: str
    action: Action


@dataclass(frozen=True)
class Schedule:
    """The passes of every rank in order.

    Attributes:
        virtual_stages: The number of pieces on each rank.
        micro_batches: The number of micro-batches of the step.
        orders: The passes of each rank.
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
        """Return the pass whose result the given one needs, or None if it starts from the data."""
        piece, last = action.piece, self.pieces - 1
        if not action.backward:
            return Action(piece - 1, action.micro_batch) if piece > 0 else None
        return (
            Action(piece + 1, action.micro_batch, backward=True) if piece < last else Action(last, action.micro_batch)
        )

    def comes_from_afar(self, action: Action) -> bool:
        """Return whether the input of the pass is made by another rank."""
        source = self.source(action)
        return source is not None and (source.piece - action.piece) % self.ranks != 0

    def held(self, rank: int) -> Iterator[tuple[Action, tuple[int, ...]]]:
        """Yield each pass of a rank, and how many micro-batches each of its pieces then holds, excluding its own."""
        counts = [0] * self.virtual_stages
        for action in self.orders[rank]:
            place = action.piece // self.ranks
            counts[place] -= action.backward
            yield action, tuple(counts)
            counts[place] += not action.backward

    def program(self, rank: int, ahead: int = 1) -> list[Instruction]:
        """Return what a rank does, including transfers.

        A rank starts receiving what its next passes need before it computes the current one, and never waits for its
        sends. Transfers between two ranks in one direction arrive in the order in which they are sent, so they are
        received in that order too; for this, a receive may come earlier than its pass needs it, never later.

        Args:
            rank: The rank.
            ahead: How many passes before its use an input is received; this takes as many additional buffers.
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
        """Play all programs through; a transfer needs both ends, and those in one direction keep their order.

        Raises:
            RuntimeError: If a pass is missing, runs twice, on a wrong rank or before its source, or if the ranks would
                receive in another order than they send, or deadlock.
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
            raise RuntimeError("the schedule does not run every pass exactly once, on the rank of its piece")
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
                        raise RuntimeError(f"{posted[0]} would be received when {sent[edge][0]} is sent")
                    here.add(posted.popleft())
                    sent[edge].popleft()
                    moved = True
        stuck = [(rank, program[0]) for rank, program in enumerate(programs) if program]
        if stuck or any(sent.values()) or any(received.values()):
            raise RuntimeError(f"the schedule deadlocks: {stuck}")

    def _target(self, action: Action) -> Action | None:
        """Return the pass on another rank that needs the result of this one."""
        following = Action(action.piece + (-1 if action.backward else 1), action.micro_batch, action.backward)
        inside = 0 <= following.piece < self.pieces
        return following if inside and self.comes_from_afar(following) else None

    def way(self, action: Action) -> Way:
        """Return between which ranks the input of a pass is sent, and whether it is a gradient."""
        source = self.source(action)
        assert source is not None
        return source.piece % self.ranks, action.piece % self.ranks, action.backward

    def _arrivals(self, rank: int) -> dict[Way, list[Action]]:
        """Return what arrives at a rank on each way, in the order in which it is sent."""
        arrivals: dict[Way, list[Action]] = {}
        for order in self.orders:
            for action in order:
                target = self._target(action)
                if target is not None and target.piece % self.ranks == rank:
                    arrivals.setdefault(self.way(target), []).append(target)
        return arrivals
