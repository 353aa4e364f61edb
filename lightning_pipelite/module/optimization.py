"""How a causal LM is optimized: the optimizer, its learning rate, and other options for some parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from optimi import Adam
from torch import nn
from torch.optim import Optimizer

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.optim import (
    OptimizerFactory,
    check_patterns,
    check_schedule,
    group_parameters,
    make_optimizer,
    make_schedule,
)
from lightning_pipelite.optim.offloaded import offload_state
from lightning_pipelite.optim.ranges import check_ranges
from lightning_pipelite.optim.schedule import rise_of
from lightning_pipelite.shared.over_ranks import gathered


class Optimization:
    """The optimizer and schedule that a module's options describe; the options are tried out at once.

    Args:
        factory: Makes the optimizer; None for optimi's Adam.
        lr: The learning rate.
        betas: Betas of the default optimizer.
        eps: Epsilon of the default optimizer.
        schedule: Schedule of the learning rate.
        warmup_steps: Warmup steps of the schedule.
        groups: Options by pattern, each for the parameters whose names contain a match.
        offload: Keep the state in host memory between steps.

    Raises:
        ConfigurationError: An option is out of range, or the optimizer would refuse it.
    """

    def __init__(
        self,
        factory: OptimizerFactory | None,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        schedule: str,
        warmup_steps: int,
        groups: Mapping[str, dict[str, float]],
        offload: bool = False,
    ) -> None:
        check_ranges(lr, betas, eps, of_default=factory is None)
        check_schedule(schedule, warmup_steps)
        check_patterns(groups)
        # One launch for many tensors: LoRA has hundreds of small ones, and the GPU would wait for the host. optimi
        # warns that this will be removed in favour of one launch per tensor.
        together = torch.cuda.is_available() or None
        warnings.filterwarnings("ignore", message="Parameter `foreach` is deprecated")
        self.factory: OptimizerFactory = factory or partial(Adam, betas=betas, eps=eps, foreach=together)
        if offload:
            self.factory = offload_state(self.factory)
        self._schedule, self._warmup_steps, self._groups = schedule, warmup_steps, groups
        self._beta2 = betas[1] if factory is None else None
        self._rehearse(lr)

    def _rehearse(self, lr: float) -> None:
        """Refuse options that the optimizer would refuse, now, before the model is loaded."""
        grouped = group_parameters([("", nn.Parameter(torch.zeros(1)))], self._groups)
        optimizer = make_optimizer(self.factory, lr, grouped, self._groups)
        if self._schedule == "rms_ratio":
            make_schedule(optimizer, self._schedule, self._warmup_steps, math.inf)

    def make(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, steps: Callable[[], float]
    ) -> tuple[Optimizer, dict[str, Any]]:
        """Make the optimizer, and its schedule in the form that Lightning takes. Collective.

        Args:
            named_parameters: The parameters of this process's stage.
            lr: The learning rate.
            steps: Returns the number of training steps, which loads the data; called only if the schedule needs it.

        Raises:
            ConfigurationError: A pattern matches no name in any stage.
        """
        grouped = group_parameters(named_parameters, self._groups)
        # A single stage may lack a group's parameters, but not all stages.
        matched = gathered([bool(group["params"]) for group in grouped[1:]])
        for pattern, found in zip(self._groups, zip(*matched, strict=True), strict=True):
            if not any(found):
                raise ConfigurationError(f"model.parameter_groups: {pattern!r} matches no trainable parameter.")
        optimizer = make_optimizer(self.factory, lr, grouped, self._groups)
        total = steps() if self._schedule == "cosine" else math.inf
        scheduler = make_schedule(optimizer, self._schedule, self._warmup_steps, total)
        return optimizer, {"scheduler": scheduler, "interval": "step"}

    def warn_of_length(self, steps: float) -> None:
        """Warn if training ends before the learning rate has risen.

        Args:
            steps: Number of steps of the whole training.
        """
        if self._schedule == "rms_ratio" and self._beta2 is None:  # not the default optimizer
            return
        half, most = rise_of(self._schedule, self._warmup_steps, self._beta2 or 0.0)
        if steps < most and self._schedule != "rms_ratio":
            rank_zero_warn(
                f"training has {steps:g} steps, but model.warmup_steps is {most}: the learning rate reaches only "
                f"{steps / most:.2g} of model.lr; lower model.warmup_steps, or train for more steps (a smaller "
                "trainer.accumulate_grad_batches or data.sequence_len, or more epochs)."
            )
        elif steps < most:
            rank_zero_warn(
                f"training has {steps:g} steps, but model.schedule {self._schedule} reaches half of the learning rate "
                f"at step {half} and nearly all of it at step {most}; for so few steps, set model.schedule to "
                "constant, with a few model.warmup_steps."
            )
