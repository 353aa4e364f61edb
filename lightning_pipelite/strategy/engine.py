"""DeepSpeed's pipeline engine, with exact losses and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn
from typing_extensions import override

from lightning_pipelite.shared.protocol import Loss
from lightning_pipelite.strategy.between_stages import back_propagate, handed_on, other_shapes, with_gradients
from lightning_pipelite.strategy.deepspeed_compat import engine_config, pipeline_module, quiet
from lightning_pipelite.strategy.gradient_check import require_gradients
from lightning_pipelite.strategy.layer_rng import LayerRNG
from lightning_pipelite.strategy.loss_sums import LossSums
from lightning_pipelite.strategy.micro_batches import MicroBatch, shapes_of
from lightning_pipelite.strategy.stage_timer import COMPUTING, StageTimer
from lightning_pipelite.strategy.ties import TiedParameters


class PipeLiteEngine(PipelineEngine):
    """Runs micro-batches through the stages with DeepSpeed's 1F1B schedule and communication.

    DeepSpeed's own forward and backward instructions divide losses by the number of micro-batches, require a gradient
    on every stage, and clip by the first stage's norm. The instructions overridden here back-propagate the plain sum
    of the losses instead; the strategy divides the gradients once, by the number of terms in the global batch.

    Args:
        stage: This rank's layers, as one module on its device.
        stage_id: The index of this stage.
        stages: The number of stages.
        column_major: The layout of the ranks; see :class:`~lightning_pipelite.shared.topology.Topology`.
        loss: The loss of one micro-batch, used on the last stage.
        progress: Called before every instruction with its name, whether it may wait for other ranks, and the piece of
            the stage that it belongs to, if there are several.
        layer_rng: The random number generators of the layers.
        timeout: How long a rank waits for the others in the process groups created here.
        add_up: Sums numbers over all ranks, on the host; also takes a description of the place. Collective.
    """

    def __init__(
        self,
        stage: nn.Module,
        stage_id: int,
        stages: int,
        column_major: bool,
        loss: Loss,
        progress: Callable[[str, bool, str], None],
        layer_rng: LayerRNG,
        timeout: timedelta,
        add_up: Callable[[list[float], str], list[float]],
    ) -> None:
        module = pipeline_module(stage, stage_id, stages, column_major)
        config = engine_config(micro_batches=1)
        with quiet():
            # As deepspeed.initialize does for a PipelineModule; it offers no way to choose the class.
            super().__init__(
                args=None,
                model=module,
                mpu=module.mpu(),
                config=config,
                config_class=DeepSpeedConfig(config, module.mpu()),
            )
        self._stage = stage
        self._progress = progress
        self._layer_rng = layer_rng
        self._add_up = add_up
        self._shapes: object = None
        self._sent: object = None
        self._step = self._forwarded = 0
        self._clock: StageTimer | None = None
        self._sums = LossSums(loss, stage_id, stages, self.device)
        self._equalize_replicas()
        self.ties = TiedParameters(stage, self.grid.get_pipe_parallel_group(), self.grid.pipe_groups, timeout)

    @override
    def _broadcast_model(self) -> None:
        """Do nothing: DeepSpeed's version views each parameter as bytes, which fails for scalars, and skips buffers."""

    def _equalize_replicas(self) -> None:
        if not self.is_data_parallel:
            return
        group = self.grid.get_data_parallel_group()
        for tensor in (*self._stage.parameters(), *self._stage.buffers()):
            sent = tensor.data.contiguous()
            dist.broadcast(sent, src=dist.get_global_rank(group, 0), group=group)
            tensor.data.copy_(sent)

    # What the strategy calls

    @property
    def pipeline_group(self) -> Any:
        """The process group of this rank's pipeline, or None for a single stage."""
        return self.grid.get_pipe_parallel_group() if self.is_pipe_parallel else None

    def train_on(self, micro_batches: Sequence[MicroBatch], step: int, clock: StageTimer | None = None) -> list[float]:
        """Run all micro-batches of a step forward and backward.

        It returns as soon as the losses are known, before the last backward pass has ended, so what the host does next
        costs a GPU no time.

        The accumulated gradients are those of the sum of all losses, divided by the number of replicas.

        Args:
            micro_batches: The same on all stages of a pipeline; the same number on all replicas.
            step: The number of steps taken before, on which the random numbers depend.
            clock: Times the instructions, if the step is to be measured.

        Returns:
            The sum and the count of the losses of the global batch, and the sums of what else the loss wants logged;
            the same on every rank.

        Raises:
            ConfigurationError: On every rank, if the stages of a pipeline have different micro-batches.
            RuntimeError: If a trainable parameter gets no gradient in the first step.
        """
        self._step = step
        self.set_train_batch_size(len(micro_batches) * self.grid.data_parallel_size)
        self._clock = clock
        try:
            self._run(micro_batches, self._train_schedule(), training=True)
            self._wait_for_others()
            self.global_steps += 1
            assert self._sums.on_host is not None
            return self._shared(self._sums.on_host.value(), f"step {step + 1}")
        finally:
            self._begin("", waits=False)
            self._clock = None

    def _wait_for_others(self) -> None:
        """Make the device wait until all ranks have finished the step, so that the clock counts this wait."""
        if self._clock is not None and dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def evaluate_on(self, micro_batches: Sequence[MicroBatch], loss: Loss | None = None) -> Tensor:
        """Run micro-batches forward, without gradients.

        Args:
            micro_batches: The same on all stages of a pipeline.
            loss: Used in place of the training loss, if given.

        Returns:
            This rank's sums for :meth:`share_evaluation`, float64: of the losses, their count, and further terms.
        """
        by_another = contextlib.nullcontext() if loss is None else self._sums.counted_by(loss)
        with torch.no_grad(), by_another:
            self._run(micro_batches, self._inference_schedule(len(micro_batches)), training=False)
        return self._sums.tensor.clone()

    def share_evaluation(self, sums: Tensor, place: str) -> list[float]:
        """Add up the results of :meth:`evaluate_on` over all ranks. Collective.

        Args:
            sums: This rank's result, or the sum of several.
            place: A description of the place, for the message.

        Returns:
            The sum and the count of the losses, and the sums of what else the loss wants logged; the same on every
            rank.

        Raises:
            ConfigurationError: On every rank, if the stages of a pipeline have different micro-batches.
        """
        return self._shared(sums.tolist(), place)

    # How the schedule runs

    def _run(self, micro_batches: Sequence[MicroBatch], steps: Any, training: bool) -> None:
        self._sums.begin(micro_batches)
        with self._layer_rng.drawn_from():
            self._execute(micro_batches, steps, training)

    def _shared(self, sums: list[float], place: str) -> list[float]:
        """Add up the sums of all ranks; only the last stages' hold losses. Collective.

        This is done on the host: on a GPU the sum would wait for everything launched before it.
        """
        self._begin("outside of the pipeline", waits=True)
        return self._sums.require_same_data(self._add_up(sums, place), place)

    def _execute(self, micro_batches: Sequence[MicroBatch], steps: Any, training: bool) -> None:
        # DeepSpeed sends the shapes once and then trusts them. Every rank sees the shapes of its pipeline's
        # micro-batches, so each knows without communication when to send them again.
        shapes = [(training, shapes_of(batch)) for batch in micro_batches]
        self.dynamic_shape = any(shape != shapes[0] for shape in shapes)
        if self.dynamic_shape or shapes[0] != self._shapes:
            self.reset_activation_shape()
            self._sent = None
        self._shapes = None if self.dynamic_shape else shapes[0]
        self._forwarded = 0
        self.data_iterator: Iterator[MicroBatch] = iter(micro_batches)
        self._exec_schedule(steps)

    @override
    def _exec_schedule(self, pipe_schedule: Any) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        for instructions in pipe_schedule:
            for instruction in instructions:
                self._announce(instruction)
                self._INSTRUCTION_MAP[type(instruction)](self, **instruction.kwargs)
        self._begin("outside of the pipeline", waits=True)

    def _announce(self, instruction: schedule.PipeInstruction) -> None:
        # On a GPU a computing instruction can wait too, wherever in the step the host reads a result.
        self._begin(instruction.name, waits=instruction.name not in COMPUTING)

    def _begin(self, activity: str, waits: bool, piece: str = "") -> None:
        if activity:
            self._progress(activity, waits, piece)
        if self._clock is not None:
            self._clock.begin(activity)

    @override
    def _allocate_or_extend_buffers(self, idx: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        # DeepSpeed keeps one buffer per index for both activations and gradients, whatever their dtypes.
        return torch.empty(shape, dtype=dtype, device=self.device)

    # Instructions: plain functions in a table, because DeepSpeed's table holds its own class's functions

    def _load(self, buffer_id: int) -> None:
        inputs, targets = next(self.data_iterator)
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = inputs
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = targets

    def _forward(self, buffer_id: int) -> None:
        self._enter(self._forwarded)
        self._forwarded += 1
        outputs = self._stage(self.pipe_buffers["inputs"][buffer_id])
        if not self.is_last_stage():
            self.pipe_buffers["outputs"][buffer_id] = self._sendable(outputs)
            return
        self.loss = self._sums.add(outputs, self.pipe_buffers["labels"][buffer_id])
        self.pipe_buffers["labels"][buffer_id] = None

    def _enter(self, micro_batch: int) -> None:
        """Tie the random numbers drawn next to this micro-batch of the replica."""
        # As the samplers distribute the sequences: number k of the global batch goes to replica k % replicas.
        replicas, replica = self.grid.data_parallel_size, self.grid.get_data_parallel_rank()
        self._layer_rng.enter(self._step, micro_batch * replicas + replica)

    def _sendable(self, outputs: Any) -> Tensor | tuple[Tensor, ...]:
        outputs = handed_on(outputs, self._place)
        shapes = shapes_of(outputs)
        if not self.dynamic_shape and self._sent not in (None, shapes):
            raise other_shapes(shapes, self._sent, self._place)
        self._sent = shapes
        return outputs

    @property
    def _place(self) -> str:
        """The stage that is running, for messages."""
        return f"stage {self.stage_id}"

    def _backward(self, buffer_id: int) -> None:
        if self.is_last_stage():
            outputs: list[Tensor] = [self.loss]
            gradients: list[Tensor | None] = [None]
            self.loss = self.loss.detach()
        else:
            outputs = with_gradients(self.pipe_buffers["outputs"][buffer_id])
            gradients = [*with_gradients(self.grad_layer)]
            self.pipe_buffers["outputs"][buffer_id] = None
        # A first stage without trainable parameters has nothing to propagate to.
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        received = None if self.is_first_stage() else self.pipe_buffers["inputs"][buffer_id]
        back_propagate(pairs, received, self._place)

    def _reduce_tied_gradients(self) -> None:
        if self.global_steps == 0:
            require_gradients(self._stage, self.stage_id)
        self.ties.reduce()

    def _reduce_gradients(self) -> None:
        # With one replica DeepSpeed would still copy every gradient into a bucket and back.
        if self.is_data_parallel:
            self._exec_reduce_grads()

    def _optimizer_step(self) -> None:
        """Do nothing: Lightning takes the optimizer's step, after its hooks."""

    _INSTRUCTION_MAP = {  # noqa: RUF012 - the name and the kind are DeepSpeed's
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _load,
        schedule.ForwardPass: _forward,
        schedule.BackwardPass: _backward,
        schedule.ReduceTiedGrads: _reduce_tied_gradients,
        schedule.ReduceGrads: _reduce_gradients,
        schedule.OptimizerStep: _optimizer_step,
    }
