"""Shows the progress of training in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.shared.progress import Style, View, duration, view
from lightning_pipelite.shared.step_clock import StepClock

STEP, ELAPSED, LEFT, EVALUATING = " step", " elapsed", " left", " evaluating"
"""Names of the parts shown beside the metrics; no metric's name begins with a space."""
LEAST_MISSED = ("lr", "tokens_per_s", ELAPSED)
"""What a narrow terminal leaves out first, in this order."""


class StepProgress(ProgressBar):
    """Shows optimizer steps, elapsed and remaining time, and the metrics logged for the progress bar.

    It replaces Lightning's progress bar, which counts micro-batches. It shows the learning rate of the optimizer's
    first parameter group and every metric logged with ``prog_bar=True``, without a leading ``train/``; metrics called
    ``..._per_s`` are rounded to whole numbers. Neither elapsed nor remaining time includes evaluations. The remaining
    time is the mean of the last steps (at most 50, without the first, which is slow) times the number of steps left.
    It is not shown if that number is unknown: for data without a length and no ``max_steps``, or for a module with
    manual optimization, which may take any number of steps per batch.

    In a terminal it is a bar, on standard error; a narrow terminal leaves out learning rate, tokens/s, elapsed time and
    so on, in this order, but keeps the losses. Without a terminal it prints a line after the first step and at the end,
    and at most one every ten seconds in between.

    Args:
        style: ``rich``; ``plain`` (tqdm) for terminals with few capabilities; ``lines``; ``auto`` chooses.

    Example::

        Trainer(callbacks=[StepProgress()], accumulate_grad_batches=8)
    """

    def __init__(self, style: Style = "auto") -> None:
        super().__init__()
        self._style: Style = style
        self._enabled = True
        self._view: View | None = None
        self._clock = StepClock()
        self._step = 0
        self._total: int | None = None
        self._lr: float | None = None
        self._batches = 0
        self._all_batches: int | None = None

    # Required by Lightning's base class

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled

    @override
    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print without breaking the bar."""
        if self._view is None:
            print(*args, sep=sep, **kwargs)
        else:
            self._view.print(sep.join(map(str, args)))

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the metrics to show beside steps and time; override it to show others."""
        metrics = {name.removeprefix("train/"): value for name, value in trainer.progress_bar_metrics.items()}
        if self._lr is not None:
            metrics["lr"] = self._lr
        first = [name for name in ("loss", "lr", "tokens_per_s") if name in metrics]  # the last ones may not fit
        return {name: metrics[name] for name in [*first, *sorted(metrics.keys() - set(first))]}

    # Training

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled:
            return
        self._step, self._clock = trainer.global_step, StepClock()
        # A resumed training's position in its epoch is known only from its first batch on.
        self._total = total_steps(trainer, batches_done=0) if self._step == 0 else None
        self._view = view("training", style=self._style, stays=True)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        rate = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
        self._lr = None if rate is None else float(rate)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._view is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._clock.step()
        if self._clock.steps == 1 or self._view.due():
            self._total = total_steps(trainer, trainer.fit_loop.batch_idx + 1)
            self._show_step(self._told(trainer, pl_module))

    def _told(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, str]:
        return {name: _shown(name, value) for name, value in self.get_metrics(trainer, pl_module).items()}

    def _show_step(self, told: Mapping[str, str]) -> None:
        assert self._view is not None
        parts = {STEP: f"step {self._step:,}" + (f"/{self._total:,}" if self._total is not None else "")}
        parts[ELAPSED] = duration(self._clock.elapsed)
        left = None if self._total is None else self._clock.remaining(self._total - self._step)
        if left:
            parts[LEFT] = f"{duration(left)} left"
        self._view.update(self._step, self._total, *_shorter_and_shorter({**parts, **told}))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._view is not None:
            self._show_step(self._told(trainer, pl_module))
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._view is not None:
            self._view.close()
            self._view = None

    # Evaluation, within training or on its own

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, "evaluating", trainer.num_val_batches)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, "testing", trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, "predicting", trainer.num_predict_batches)

    def _begin(self, trainer: pl.Trainer, label: str, batches: Sequence[float] | float) -> None:
        total = sum(batches) if isinstance(batches, Sequence) else batches
        self._batches, self._all_batches = 0, int(total) if total < math.inf else None
        if trainer.state.fn == TrainerFn.FITTING:
            self._clock.pause()
        elif self._enabled:
            self._clock = StepClock()
            self._view = view(label, style=self._style)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._count(trainer)

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._count(trainer)

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._count(trainer)

    def _count(self, trainer: pl.Trainer) -> None:
        self._batches += 1
        if self._view is None or not self._view.due():
            return
        batches = f"{self._batches:,}" + (f"/{self._all_batches:,}" if self._all_batches is not None else "")
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_step({EVALUATING: f"evaluating {batches}"})
        else:
            self._view.update(self._batches, self._all_batches, f"batch {batches}, {duration(self._clock.elapsed)}")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._clock.go_on()
        else:
            self._close()


def total_steps(trainer: pl.Trainer, batches_done: int) -> int | None:
    """Return the number of steps at the end of training, None if unknown; callbacks may still stop it earlier.

    Lightning's own estimate assumes that all epochs accumulate as many batches as the current one.

    Args:
        trainer: The Trainer, within an epoch.
        batches_done: Number of batches of the epoch that are done.
    """
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    at_most = math.inf if trainer.max_steps == -1 else trainer.max_steps
    total = math.inf
    if epochs not in (None, -1) and batches < math.inf:
        if not trainer.lightning_module.automatic_optimization:
            return None
        schedules = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]  # type: ignore[attr-defined]

        def steps(batches: float, epoch: int) -> int:
            factors = [each.get_accumulate_grad_batches(epoch) for each in schedules]
            return math.ceil(batches / (factors or [trainer.accumulate_grad_batches])[-1])

        total = trainer.global_step - steps(batches_done, trainer.current_epoch)
        total += sum(steps(batches, epoch) for epoch in range(trainer.current_epoch, epochs))
    total = min(total, at_most)
    return int(total) if total < math.inf else None


def _shorter_and_shorter(parts: Mapping[str, str]) -> Iterator[str]:
    """Yield a line of all parts, then ever shorter ones: the least important parts go first, losses last."""
    kept = dict(parts)
    losses = [name for name in parts if name.rpartition("/")[2] == "loss"]
    others = [name for name in reversed([*parts]) if name not in (*LEAST_MISSED, *losses, STEP, EVALUATING)]
    yield ", ".join(kept.values())
    for name in (*LEAST_MISSED, *others, *reversed(losses)):
        if kept.pop(name, None) is not None:
            yield ", ".join(kept.values())


def _shown(name: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return f"{name} {value}"
    if name.endswith("_per_s"):
        return f"{value:,.0f} {name.removesuffix('_per_s')}/s"
    return f"{name} {value:.1e}" if name == "lr" else f"{name} {value:.4g}"
