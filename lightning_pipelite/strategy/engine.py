"""DeepSpeed's pipeline engine, with exact losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn
from typing_extensions import override

from lightning_pipelite.strategy.deepspeed_compat import engine_config, pipeline_module, quiet
from lightning_pipelite.strategy.layers import Loss
from lightning_pipelite.strategy.ties import TiedParameters

MicroBatch = tuple[Any, Any]
"""``(inputs, targets)``: what the first stage starts from, and what the loss on the last stage needs."""

_COMPUTING = (schedule.LoadMicroBatch, schedule.ForwardPass, schedule.BackwardPass)
"""Instructions that need no other rank. On a GPU the others wait where the host reads a result, in the step, say."""


class PipeLiteEngine(PipelineEngine):
    """Runs micro-batches through the stages by DeepSpeed's 1F1B schedule and its communication.

    DeepSpeed's own forward and backward instructions divide losses by the number of micro-batches, require a gradient
    on every stage, and clip by the first stage's norm. The instructions overridden here back-propagate the plain sum
    of the losses instead; the strategy divides the gradients, once, by the number of terms in the global batch.

    Args:
        stage: this rank's layers, as one module on its device.
        stage_id: which stage it is.
        stages: the number of stages.
        column_major: the layout of the ranks, see :class:`~lightning_pipelite.strategy.topology.Topology`.
        loss: the loss of one micro-batch, used on the last stage.
        progress: told of every instruction before it runs: its name, and whether it may wait for other ranks.
        step: called on every rank where the schedule has the optimizer step, with the sum and the count of the losses
            of the global batch, a float64 tensor of shape (2,) on the device; gradients are then summed, and divided
            by the number of replicas.
    """

    def __init__(
        self,
        stage: nn.Module,
        stage_id: int,
        stages: int,
        column_major: bool,
        loss: Loss,
        progress: Callable[[str, bool], None],
        step: Callable[[Tensor], None],
    ) -> None:
        module = pipeline_module(stage, stage_id, stages, column_major)
        config = engine_config(micro_batches=1)
        with quiet():
            # What deepspeed.initialize does for a PipelineModule; it offers no way to choose the class.
            super().__init__(
                args=None,
                model=module,
                mpu=module.mpu(),
                config=config,
                config_class=DeepSpeedConfig(config, module.mpu()),
            )
        self._stage = stage
        self._loss_of = loss
        self._progress = progress
        self._step = step
        self._shapes: object = None
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.ties = TiedParameters(stage, self.grid.get_pipe_parallel_group(), self.grid.pipe_groups)

    # What the strategy calls

    def train_on(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forward and backward of all micro-batches of a step, then the step itself.

        Args:
            micro_batches: the same on all stages of a pipeline; the same number on all replicas.
        """
        self.set_train_batch_size(len(micro_batches) * self.grid.data_parallel_size)
        self._run(micro_batches, self._train_schedule())

    def evaluate_on(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Forward of some micro-batches, without gradients.

        Returns:
            The sum and the count of their losses, float64, shape (2,); zeros but on the last stage.
        """
        with torch.no_grad():
            self._run(micro_batches, self._inference_schedule(len(micro_batches)))
        return self._sums.clone()

    def share(self, sums: Tensor) -> Tensor:
        """Add up what the last stages of all replicas have, and give it to every rank. Collective."""
        if self.is_data_parallel and self.is_last_stage():
            dist.all_reduce(sums, group=self.grid.get_data_parallel_group())
        if self.is_pipe_parallel:
            dist.broadcast(sums, src=self._loss_stage_global_rank(), group=self.grid.get_pipe_parallel_group())
        return sums

    # How the schedule runs

    def _run(self, micro_batches: Sequence[MicroBatch], steps: Any) -> None:
        # DeepSpeed sends the shapes once and then trusts them. Every rank sees the shapes of its pipeline's
        # micro-batches, so each knows without communication when they must be sent anew.
        shapes = [_shapes(batch) for batch in micro_batches]
        self.dynamic_shape = any(shape != shapes[0] for shape in shapes)
        if self.dynamic_shape or shapes[0] != self._shapes:
            self.reset_activation_shape()
        self._shapes = None if self.dynamic_shape else shapes[0]
        self._sums.zero_()
        self.data_iterator: Iterator[MicroBatch] = iter(micro_batches)
        self._exec_schedule(steps)

    @override
    def _exec_schedule(self, pipe_schedule: Any) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        for instructions in pipe_schedule:
            for instruction in instructions:
                self._progress(instruction.name, not isinstance(instruction, _COMPUTING))
                self._INSTRUCTION_MAP[type(instruction)](self, **instruction.kwargs)
        self._progress("outside of the pipeline", True)

    @override
    def _allocate_or_extend_buffers(self, idx: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        # DeepSpeed keeps one buffer for the activations and the gradients of each index, whatever their dtypes.
        return torch.empty(shape, dtype=dtype, device=self.device)

    # Instructions: plain functions in a table, because DeepSpeed's table holds its own class's functions

    def _load(self, buffer_id: int) -> None:
        inputs, targets = next(self.data_iterator)
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = inputs
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = targets

    def _forward(self, buffer_id: int) -> None:
        outputs = self._stage(self.pipe_buffers["inputs"][buffer_id])
        if not self.is_last_stage():
            self.pipe_buffers["outputs"][buffer_id] = outputs
            return
        terms = self._loss_of(outputs, self.pipe_buffers["labels"][buffer_id])
        self.loss, count = terms if isinstance(terms, tuple) else (terms, torch.ones_like(terms))
        self.pipe_buffers["labels"][buffer_id] = None
        self._sums += torch.stack([self.loss.detach().to(self._sums), count.detach().to(self._sums)])

    def _backward(self, buffer_id: int) -> None:
        if self.is_last_stage():
            outputs, gradients = [self.loss], [None]
            self.loss = self.loss.detach()
        else:
            outputs = _tensors(self.pipe_buffers["outputs"][buffer_id])
            gradients = _tensors(self.grad_layer)
            self.pipe_buffers["outputs"][buffer_id] = None
        # A first stage without trainable parameters has nothing to propagate to.
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    def _reduce_tied_gradients(self) -> None:
        if self.global_steps == 0:
            self._require_gradients()
        self.ties.reduce()

    def _require_gradients(self) -> None:
        """Stop if something that should train does not: DeepSpeed would fill in zeros and go on."""
        missing = [name for name, p in self._stage.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise RuntimeError(
                f"stage {self.stage_id}: no gradient reached {', '.join(missing[:3])}{more} in the first step; "
                "freeze what the loss does not depend on (requires_grad=False)"
            )

    def _reduce_gradients(self) -> None:
        # With one replica DeepSpeed would still copy every gradient into a bucket and back.
        if self.is_data_parallel:
            self._exec_reduce_grads()

    def _optimizer_step(self) -> None:
        self._step(self.share(self._sums))
        self.global_steps += 1

    _INSTRUCTION_MAP = {  # noqa: RUF012 - the name and the kind are DeepSpeed's
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _load,
        schedule.ForwardPass: _forward,
        schedule.BackwardPass: _backward,
        schedule.ReduceTiedGrads: _reduce_tied_gradients,
        schedule.ReduceGrads: _reduce_gradients,
        schedule.OptimizerStep: _optimizer_step,
    }


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors that a stage hands on whose gradients come back: DeepSpeed sends those of floating type."""
    return [t for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if t.is_floating_point()]


def _shapes(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    return [_shapes(item) for item in batch] if isinstance(batch, (tuple, list)) else None
