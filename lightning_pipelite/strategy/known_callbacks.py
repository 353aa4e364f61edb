"""Which of Lightning's callbacks do the same in a pipeline as elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import KnowsMetrics
from lightning_pipelite.strategy.monitors import refuse_monitor

KNOWN: tuple[type[Any], ...] = (
    lightnings.BasePredictionWriter,
    lightnings.Checkpoint,
    lightnings.DeviceStatsMonitor,
    lightnings.EarlyStopping,
    lightnings.GradientAccumulationScheduler,
    lightnings.LambdaCallback,
    lightnings.LearningRateMonitor,
    lightnings.ModelSummary,
    lightnings.ProgressBar,
    lightnings.SpikeDetection,
    lightnings.ThroughputMonitor,
    lightnings.Timer,
    SaveConfigCallback,
)
"""Callbacks known to work with one stage and with two. All others of Lightning's are refused, including new ones."""

_AVERAGES = "it averages the weights that the module has before the pipeline builds its stages"
_FREEZES = "parameters that it unfreezes and adds to the optimizer may belong to other stages, and are not saved"
_SEARCHES = "it trains for a few trial steps and restores the weights, which a pipeline does not support"
_REASONS: dict[str, tuple[str, str]] = {
    "WeightAveraging": (_AVERAGES, "average checkpoints or adapters afterwards"),
    "StochasticWeightAveraging": (_AVERAGES, "average checkpoints or adapters afterwards"),
    "BaseFinetuning": (
        _FREEZES,
        "freeze layers before training, and unfreeze them in a second run",
    ),
    "ModelPruning": ("it prunes weights that the module has before the pipeline builds its stages", "prune afterwards"),
    "LearningRateFinder": (_SEARCHES, "compare the losses of a few short runs"),
    "BatchSizeFinder": (_SEARCHES, "see what fits with `pipelite plan`"),
}


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that would silently do nothing or something else; users' own callbacks are accepted.

    Raises:
        ConfigurationError: Naming the callback, the reason, and what to do instead.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        kind = _lightnings(type(callback))
        if kind is Callback or issubclass(kind, KNOWN):
            continue
        reason, remedy = next(
            (_REASONS[each.__name__] for each in kind.__mro__ if each.__name__ in _REASONS),
            ("it is not known to work with pipeline stages", "use another callback"),
        )
        own = "" if type(callback) is kind else f" (a {kind.__name__})"
        raise ConfigurationError(
            f"the callback {type(callback).__name__}{own} is not supported by PipeLiteStrategy: {reason}; leave it "
            f"out, and {remedy}."
        )
    _check_accumulation(trainer, callbacks)


def check_monitors(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse to monitor a metric that nothing will log, if the module can tell; otherwise it shows after an epoch.

    Nothing is refused if there is a callback of the user's own, as that may log anything.

    Raises:
        ConfigurationError: Naming the callback and the metric.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    package = __name__.partition(".")[0] + "."
    own = any(not type(each).__module__.startswith(("lightning.", package)) for each in callbacks)
    if own or not isinstance(module, KnowsMetrics):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        of_lightning = isinstance(callback, lightnings.ModelCheckpoint) and monitor in ("epoch", "step")
        strict = getattr(callback, "strict", True)
        if isinstance(monitor, str) and strict and not of_lightning and not module.logs(monitor):
            refuse_monitor(type(callback).__name__, monitor)


def _lightnings(kind: type) -> type:
    """Return the Lightning class that a callback's class is or derives from; Callback if there is none."""
    return next((each for each in kind.__mro__ if each.__module__.startswith("lightning.pytorch.")), Callback)


def micro_batches_in(trainer: pl.Trainer, epoch: int) -> int:
    """How many micro-batches a step of that epoch takes on each replica, which a callback may schedule."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, lightnings.GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def _check_accumulation(trainer: pl.Trainer, callbacks: Iterable[Callback]) -> None:
    """Refuse what GradientAccumulationScheduler itself refuses only after everything has been loaded."""
    scheduled = any(isinstance(each, lightnings.GradientAccumulationScheduler) for each in callbacks)
    if scheduled and trainer.accumulate_grad_batches != 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but a "
            "GradientAccumulationScheduler sets it for each epoch; leave one of the two out."
        )
