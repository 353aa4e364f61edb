"""Evaluates before the first step, a number of times per epoch, and at its end."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError


class EvalSchedule(Callback):
    """Evaluates before the first step and at evenly spaced steps, including the last of each epoch and of training.

    It replaces ``Trainer(val_check_interval=)``, which counts micro-batches and so may fall between two steps;
    ``check_val_every_n_epoch`` still applies. Each evaluation prints one line with the loss and its change in per cent
    since the last one; with several evaluation sets, it includes those of each set, the metrics called
    ``MONITOR/NAME``.

    Args:
        evals_per_epoch: Evaluations per epoch, at most one per step. Must be 1 for data without a length, as its epochs
            cannot be divided.
        monitor: The metric whose change is printed.

    Raises:
        ConfigurationError: If ``evals_per_epoch`` is not positive; from ``Trainer.fit``, if the Trainer has another
            schedule, or if the data has no length and ``evals_per_epoch`` is not 1.
    """

    def __init__(self, evals_per_epoch: int = 10, monitor: str = "eval/loss") -> None:
        if evals_per_epoch < 1:
            raise ConfigurationError(f"EvalSchedule: evals_per_epoch must be at least 1, not {evals_per_epoch}.")
        self.evals_per_epoch = evals_per_epoch
        self.monitor = monitor
        self._last: dict[str, float] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._last = {}  # of an earlier fit; a resumed one restores its own later
        interval = getattr(trainer, "val_check_interval", None)  # Lightning leaves it unset if it is a time
        if interval != 1.0 or isinstance(interval, int):
            raise ConfigurationError(
                "EvalSchedule and Trainer(val_check_interval=) both set when to evaluate; leave one of them out (the "
                "latter together with check_val_every_n_epoch=None)."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.num_training_batches == math.inf and self.evals_per_epoch > 1:
            raise ConfigurationError(
                f"EvalSchedule: an epoch of data without a length cannot be divided into {self.evals_per_epoch} parts; "
                "set evals_per_epoch to 1, set Trainer(limit_train_batches=) to a number, or give the data a __len__."
            )
        if trainer.global_step > 0:
            # On resuming, Lightning checks for an evaluation after the last batch before it fetches another.
            self._schedule(trainer, trainer.global_step)
            return
        if not trainer.enable_validation:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._schedule(trainer, trainer.global_step + 1)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.automatic_optimization:  # a batch may take any number of steps
            self._schedule(trainer, trainer.global_step)

    def _schedule(self, trainer: pl.Trainer, step: int) -> None:
        """Set whether Lightning evaluates after this batch; if the batch ends a step, its number is ``step``."""
        loop = trainer.fit_loop.epoch_loop
        batch = loop.batch_idx + 1
        ends_epoch = loop._num_ready_batches_reached()
        ends_training = not loop._should_accumulate() and 0 < trainer.max_steps <= step
        due = ends_training or ends_epoch or batch in self._due(trainer)
        # Lightning evaluates when val_check_batch divides the number of batches done in the epoch.
        trainer.val_check_batch = batch if due else batch + 1

    def _due(self, trainer: pl.Trainer) -> set[int]:
        """Return the numbers of batches of an epoch after which to evaluate."""
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        if batches == math.inf:
            return set()  # only at the end of the epoch
        steps = math.ceil(batches / accumulate)
        evals = min(self.evals_per_epoch, steps)
        return {min(round(k * steps / evals) * accumulate, int(batches)) for k in range(1, evals + 1)}

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
