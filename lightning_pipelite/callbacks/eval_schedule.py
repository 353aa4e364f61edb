"""Evaluation before the first step, a number of times an epoch, and at its end."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError


class EvalSchedule(Callback):
    """Evaluates before the first step and at evenly spaced steps, the last of each epoch and of training among them.

    It replaces ``Trainer(val_check_interval=)``, which counts micro-batches and so may fall between two steps. Each
    evaluation prints one line with the loss and its change in per cent against the one before; where there are several
    evaluation sets, with those of each, the metrics called ``MONITOR/NAME``.

    Args:
        evals_per_epoch: how many evaluations an epoch has, at most one a step.
        monitor: the metric whose change is printed.

    Raises:
        ConfigurationError: if ``evals_per_epoch`` is not positive.
    """

    def __init__(self, evals_per_epoch: int = 10, monitor: str = "eval/loss") -> None:
        if evals_per_epoch < 1:
            raise ConfigurationError(f"EvalSchedule: evals_per_epoch must be at least 1, not {evals_per_epoch}.")
        self.evals_per_epoch = evals_per_epoch
        self.monitor = monitor
        self._last: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0:
            # Lightning asks whether the evaluation after the last batch is done before it takes another.
            self._schedule(trainer, trainer.fit_loop.epoch_loop.batch_idx, trainer.global_step)
            return
        if trainer.fit_loop.epoch_loop.val_loop.skip or not trainer.enable_validation:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._schedule(trainer, batch_idx, trainer.global_step + 1)

    def _schedule(self, trainer: pl.Trainer, batch_idx: int, step: int) -> None:
        """Have an evaluation after this batch, or none; if it ends a step, that is number ``step``."""
        # Lightning evaluates when val_check_batch divides the number of batches done in the epoch.
        batches, accumulate = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        ends_step = (batch_idx + 1) % accumulate == 0 or batch_idx + 1 == batches
        ends_training = ends_step and step == trainer.max_steps
        due = ends_training or batch_idx + 1 in self._due(batches, accumulate)
        trainer.val_check_batch = batch_idx + 1 if due else batch_idx + 2

    def _due(self, batches: int, accumulate: int) -> set[int]:
        """After how many batches of an epoch to evaluate."""
        steps = math.ceil(batches / accumulate)
        evals = min(self.evals_per_epoch, steps)
        return {min(round(k * steps / evals) * accumulate, batches) for k in range(1, evals + 1)}

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        found = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if isinstance(value, Tensor) and (name == self.monitor or name.startswith(self.monitor + "/"))
        }
        if found:
            told = ", ".join(f"{name} {found[name]:.4f}{self._change(name, found[name])}" for name in sorted(found))
            pl_module.print(f"step {trainer.global_step}: {told}")
            self._last = found

    def _change(self, name: str, loss: float) -> str:
        last = self._last.get(name)
        return f" ({100 * (loss / last - 1):+.2f} % since the last)" if last else ""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = state_dict["last"]
