"""The engine of a pipeline in which each rank has several pieces of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from typing_extensions import override

from lightning_pipelite.strategy.between_stages import back_propagate, handed_on, other_shapes, with_gradients
from lightning_pipelite.strategy.engine import PipeLiteEngine
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.micro_batches import MicroBatch, shapes_of
from lightning_pipelite.strategy.pieces import Pieces, in_words
from lightning_pipelite.strategy.schedule import Action, Schedule
from lightning_pipelite.strategy.stage_timer import COMPUTING
from lightning_pipelite.strategy.transfers import Arrival, Shapes, Transfers

_AHEAD = 1
"""How many passes before its use the receive of an input is started."""

_MOST_KEYS = 256
"""How many kinds of micro-batches are remembered; one that does not even equal itself is added every time."""


class _PassInstruction(schedule.PipeInstruction):
    """An instruction about one pass, timed under the name of the DeepSpeed instruction that it corresponds to."""

    names: tuple[str, str]

    def __init__(self, action: Action) -> None:
        super().__init__(action=action)
        self.name = self.names[action.backward]


class ReceivePass(_PassInstruction):
    """Start receiving what the pass needs from another rank."""

    names = ("RecvActivation", "RecvGrad")


class RunPass(_PassInstruction):
    """Run the pass, once what it needs has arrived."""

    names = ("ForwardPass", "BackwardPass")


class SendPass(_PassInstruction):
    """Start sending the result of the pass to another rank."""

    names = ("SendActivation", "SendGrad")


class InterleavedSchedule(schedule.PipeSchedule):
    """A rank's part of a :class:`~lightning_pipelite.strategy.schedule.Schedule`, in DeepSpeed's form.

    Args:
        plan: The passes of all ranks.
        stage_id: The index of this rank in the pipeline.
        training: Whether gradients are reduced at the end.
        ahead: How many passes before its use the receive of an input is started.
    """

    _KINDS = {"receive": ReceivePass, "compute": RunPass, "send": SendPass}  # noqa: RUF012

    def __init__(self, plan: Schedule, stage_id: int, training: bool, ahead: int) -> None:
        super().__init__(plan.micro_batches, plan.ranks, stage_id)
        self._plan, self._training, self._ahead = plan, training, ahead

    @override
    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        for instruction in self._plan.program(self.stage_id, self._ahead):
            yield [self._KINDS[instruction.name](instruction.action)]
        if self._training:
            yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]

    @override
    def num_pipe_buffers(self) -> int:
        return 0  # tensors in flight are kept by piece and micro-batch instead


class InterleavedEngine(PipeLiteEngine):
    """Runs several pieces of the model on each rank, in the order of interleaved 1F1B.

    Transfers are hidden: a rank starts to receive what its next pass needs before it computes the current one, and
    never waits for what it sends (:class:`~lightning_pipelite.strategy.schedule.Schedule`). The shapes of what is sent
    are exchanged once for micro-batches of equal shapes; the first time nothing is received ahead.

    Args:
        stage: This rank's pieces.
        arguments: As for :class:`~lightning_pipelite.strategy.engine.PipeLiteEngine`.
    """

    _stage: Pieces

    def __init__(self, stage: nn.Module, *arguments: Any, **named: Any) -> None:
        super().__init__(stage, *arguments, **named)
        self._transfers = Transfers(self.grid.pipe_groups, self.global_rank, self.device, named["timeout"])
        self._told: dict[tuple[int, Any], Shapes] = {}  # of what a piece passes on, for a kind of micro-batch
        self._known: set[Any] = set()  # the kinds of micro-batches whose shapes every rank knows
        self._step_data: Sequence[MicroBatch] = ()
        self._keys: list[Any] = []
        self._piece = 0  # the one that is running
        self._arrivals: dict[Action, Arrival] = {}
        self._inputs: dict[tuple[int, int], Any] = {}
        self._roots: dict[tuple[int, int], list[Any]] = {}  # where the backward pass starts
        self._results: dict[Action, Any] = {}

    @override
    def destroy(self) -> None:
        if transfers := self.__dict__.pop("_transfers", None):
            transfers.close()
        super().destroy()

    @override
    def _train_schedule(self) -> Schedule:
        return _checked(self.num_stages, len(self._stage), self.micro_batches, training=True)

    @override
    def _inference_schedule(self, micro_batches: int) -> Schedule:
        return _checked(self.num_stages, len(self._stage), micro_batches, training=False)

    @override
    def _execute(self, micro_batches: Sequence[MicroBatch], steps: Schedule, training: bool) -> None:
        self._plan, self._step_data = steps, micro_batches
        self._keys = [_hashable((training, shapes_of(batch))) for batch in micro_batches]
        # Every rank sees the shapes of its pipeline's micro-batches, so each knows what the others know.
        if len(self._known) > _MOST_KEYS:
            self._known.clear()
            self._told.clear()
        ahead = _AHEAD if self._known.issuperset(self._keys) else 0
        try:
            self._exec_schedule(InterleavedSchedule(steps, self.stage_id, training, ahead))
            self._transfers.finish()
            self._known.update(self._keys)
        finally:
            for held in (self._arrivals, self._inputs, self._roots, self._results):
                held.clear()
            self._step_data = ()

    @override
    def _announce(self, instruction: schedule.PipeInstruction) -> None:
        if not isinstance(instruction, _PassInstruction):
            super()._announce(instruction)
            return
        self._piece = instruction.action.piece
        name = instruction.name
        if instruction.action in self._arrivals:
            name = ReceivePass(instruction.action).name  # until its input has arrived
        self._begin(name, waits=name not in COMPUTING, piece=self._piece_in_words())

    @property
    @override
    def _place(self) -> str:
        return f"stage {self.stage_id}, {self._piece_in_words()}"

    def _piece_in_words(self) -> str:
        return f"piece {self._piece}, {in_words(self._stage.spans[self._piece // self.num_stages])}"

    # Instructions

    def _receive(self, action: Action) -> None:
        way, key = self._plan.way(action), self._keys[action.micro_batch]
        if action.backward:
            shapes = self._told[action.piece, key].of_gradients()
        else:
            if (action.piece - 1, key) not in self._told:
                self._told[action.piece - 1, key] = self._transfers.receive_shapes(way)
            shapes = self._told[action.piece - 1, key]
        self._arrivals[action] = self._transfers.receive(shapes, way)

    def _run_pass(self, action: Action) -> None:
        received = None
        if action in self._arrivals:
            received = self._arrivals.pop(action).wait()
            self._begin(RunPass(action).name, waits=False, piece=self._piece_in_words())
        if action.backward:
            self._go_backward(action, received)
        else:
            self._go_forward(action, received)

    def _go_forward(self, action: Action, received: list[Tensor] | None) -> None:
        piece, number = action.piece, action.micro_batch
        training = torch.is_grad_enabled()
        inputs, targets = self._step_data[number]
        if received is not None:
            inputs = [tensor.requires_grad_(training and tensor.is_floating_point()) for tensor in received]
            inputs = inputs[0] if self._told[piece - 1, self._keys[number]].single else tuple(inputs)
            if training:
                self._inputs[piece, number] = inputs
        self._enter(number)
        outputs = self._stage[piece // self.num_stages](inputs)
        if piece == self._plan.pieces - 1:
            roots: list[Any] = [self._sums.add(outputs, targets)]
        else:
            result = self._results[action] = handed_on(outputs, self._place)
            # Edges, not the tensors: these are no longer needed here once they are sent.
            roots = [get_gradient_edge(t) if t.requires_grad else None for t in with_gradients(result)]
        if training:
            self._roots[piece, number] = roots

    def _go_backward(self, action: Action, received: list[Tensor] | None) -> None:
        place = action.piece, action.micro_batch
        inputs = self._inputs.pop(place, None)
        gradients: Sequence[Tensor | None] = [None] if received is None else received
        pairs = zip(self._roots.pop(place), gradients, strict=True)
        # A first piece without trainable parameters has nothing to propagate to.
        back_propagate([pair for pair in pairs if pair[0] is not None], inputs, self._place)
        if inputs is not None:
            gradients = [tensor.grad for tensor in with_gradients(inputs)]
            self._results[action] = [gradient.contiguous() for gradient in gradients if gradient is not None]

    def _send(self, action: Action) -> None:
        result = self._results.pop(action)
        neighbour = (self.stage_id + (-1 if action.backward else 1)) % self.num_stages
        way = self.stage_id, neighbour, action.backward
        if not action.backward:
            shapes, place = Shapes.of(result), (action.piece, self._keys[action.micro_batch])
            if place not in self._told:
                self._told[place] = shapes
                self._transfers.send_shapes(shapes, way)
            elif self._told[place] != shapes:
                raise other_shapes(shapes.tensors, self._told[place].tensors, self._place)
        self._transfers.send([result] if isinstance(result, Tensor) else result, way)

    _INSTRUCTION_MAP = {  # noqa: RUF012 - the name and the kind are DeepSpeed's
        **PipeLiteEngine._INSTRUCTION_MAP,
        ReceivePass: _receive,
        RunPass: _run_pass,
        SendPass: _send,
    }


@lru_cache(maxsize=16)
def _checked(ranks: int, virtual_stages: int, micro_batches: int, training: bool) -> Schedule:
    """Return the schedule, which is simulated before it is first run.

    On real ranks an error in it would be a deadlock.
    """
    plan = interleaved_1f1b(ranks, virtual_stages, micro_batches, training)
    for ahead in (0, _AHEAD):
        plan.check(ahead)
    return plan


def _hashable(shapes: Any) -> Any:
    return tuple(_hashable(item) for item in shapes) if isinstance(shapes, (list, tuple)) else shapes
