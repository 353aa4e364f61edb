"""A training step: its micro-batches, its loss and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pipelite.shared.async_scalar import on_host
from lightning_pipelite.shared.requires_grad import RequiresGradWatch
from lightning_pipelite.strategy.checkpointing import Checkpointing
from lightning_pipelite.strategy.checks import check_optimizers
from lightning_pipelite.strategy.empty_groups import EmptyGroups
from lightning_pipelite.strategy.gradient_check import GradientCheck
from lightning_pipelite.strategy.gradients import GradientNorms, gradient_norms, scale_gradients
from lightning_pipelite.strategy.micro_batches import MicroBatch
from lightning_pipelite.strategy.pipeline import Pipeline
from lightning_pipelite.strategy.stage_timer import StageTimer


class PipelineTraining:
    """Collects the micro-batches of a step, runs them forward and backward, and holds the gradients until used.

    Args:
        pipeline: Runs the micro-batches.
        stage: This rank's stage.
        checkpointing: Notified of the progress of the step.
        logged: The names of what the loss returns in addition.
    """

    def __init__(
        self, pipeline: Pipeline, stage: nn.Module, checkpointing: Checkpointing, logged: tuple[str, ...]
    ) -> None:
        self._pipeline, self._trainer, self._engine = pipeline, pipeline.trainer, pipeline.engine
        self._checkpointing, self._logged = checkpointing, logged
        self._gradient_check = GradientCheck(stage, self._engine.pipeline_group)
        self._requires_grad = RequiresGradWatch(stage)
        self._micro_batches: list[MicroBatch] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._loss = torch.zeros(())
        self.parameters: list[Tensor] = list(stage.parameters())
        """The parameters of this rank's stage; collecting them again would take 10 ms in every step."""
        self._empty_groups: EmptyGroups | None = None  # of the optimizer, once there is one
        self.instruction_times: dict[str, float] | None = None
        """Seconds of the last step by DeepSpeed's names of the instructions; None if it was not measured."""

    def take_optimizer(self, optimizers: Sequence[Optimizer]) -> None:
        """Restrict the module's optimizer to this stage's parameters.

        Raises:
            ConfigurationError: If there is not exactly one optimizer, or it would leave something untrained.
        """
        check_optimizers(optimizers, self._trainer.lightning_module, self.parameters)
        (optimizer,) = optimizers
        mine = {id(p) for p in self.parameters}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in mine]
            group.pop("param_names", None)  # they differ between stages; checkpoints store names anyway
        self._empty_groups = EmptyGroups(optimizer)

    def take(self, micro_batch: MicroBatch, *, measure: bool) -> Tensor:
        """Take one more micro-batch; on the last one of a step, run them all.

        Args:
            micro_batch: ``(inputs, targets)``.
            measure: Whether to time the step that it completes.

        Returns:
            The loss of the last step that was run.
        """
        loop = self._trainer.fit_loop
        # Lightning passes the index only if the module's own training_step takes it.
        if loop.epoch_loop.batch_idx % self._trainer.accumulate_grad_batches == 0:
            self._micro_batches.clear()
        self._micro_batches.append(micro_batch)
        if not loop._should_accumulate():
            micro_batches, self._micro_batches = self._micro_batches, []
            self._train_on(micro_batches, measure)
        return self._loss

    def _train_on(self, micro_batches: list[MicroBatch], measure: bool) -> None:
        """Compute the loss and the gradients of a step.

        The engine's gradients are those of the sum of all losses, divided by the number of replicas. Dividing by the
        number of terms in the global batch instead makes them exact, however the valid tokens are distributed over the
        micro-batches. Lightning sets gradients to zero between its training step and its backward, so they are kept
        aside until then.
        """
        trainer, module = self._trainer, self._trainer.lightning_module
        self._requires_grad.look()
        for parameter in self.parameters:
            parameter.grad = None
        self._checkpointing.step_starts(trainer.optimizers[0])
        self._pipeline.loose_parts.follow()
        clock = StageTimer(self._engine.device) if measure else None
        loop = trainer.fit_loop.epoch_loop
        place = f"epoch {trainer.current_epoch}, the step up to micro-batch {loop.batch_idx + 1}"
        self._pipeline.agree(place, micro_batches)
        # Apart from measured times, offloaded inputs and the check of norms, the only host synchronisation of a step.
        total, count, *logged = self._engine.train_on(micro_batches, trainer.global_step, clock)
        self.instruction_times = None if clock is None else clock.seconds()
        if not (count > 0 and math.isfinite(total)):
            why = f"the loss is {total / count}" if count > 0 else "every target is masked, so nothing can be learned"
            step = trainer.global_step + 1
            raise RuntimeError(f"step {step}: {why}; training stops before the weights are changed")
        scale_gradients(self.parameters, self._pipeline.topology.replicas / count)
        self._gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._loss = torch.tensor(total / count)
        self._checkpointing.last_step.batches_taken()
        module.log("train/loss", self._loss, prog_bar=True, batch_size=1)
        for name, value in zip(self._logged, logged, strict=True):
            module.log(f"train/{name}", on_host(value / count), batch_size=1)

    # The use of the gradients, when Lightning calls its precision plugin

    def hand_over_gradients(self) -> None:
        """Give the parameters the gradients of the step."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []

    def gradient_norms(self) -> GradientNorms:
        """Return the 2-norms of the gradients over all stages, each tied parameter counted once. Collective."""
        counted = [p for p in self.parameters if self._engine.ties.counts_here(p)]
        return gradient_norms(counted, self._engine.pipeline_group, self._engine.device)

    def require_finite(self, norms: GradientNorms, clipped: Tensor) -> None:
        """Raise, before the weights change, if the gradients are not finite before or after clipping."""
        self._gradient_check.require_finite(self._trainer.global_step + 1, norms, clipped)

    def weights_change(self) -> None:
        """Note that the optimizer has its gradients, and is about to change the weights."""
        self._checkpointing.last_step.weights_change()
        if self._empty_groups is not None:
            self._empty_groups.hide()
