"""Logs how long each stage computes and waits, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_pipelite.callbacks.support.stage_bars import stage_bars
from lightning_pipelite.shared.over_ranks import LoggedSteps, gathered, logs_now
from lightning_pipelite.shared.protocol import TimesStages

PICTURE_EVERY = 10
"""Every this many times that the numbers are logged, the picture is logged too."""


@dataclass(frozen=True)
class StageState:
    """What a rank reports about its stage: seconds in the last step, and bytes."""

    stage: int
    busy: float | None
    waiting: float | None
    memory: int


class StageTimes(Callback):
    """Logs how long each stage was busy and waiting in a step, and its memory, whenever Lightning logs a step.

    ``stage_busy_s/N`` and ``stage_waiting_s/N``: seconds that stage N spent computing, and waiting for other ranks, in
    this step; the mean over its replicas. ``stage_memory_gib/N``: the peak memory that torch has allocated on its GPU
    so far, or without a GPU the current resident memory of the process; the largest of its replicas.
    ``train/stage_imbalance``: busy time of the busiest stage divided by the mean of all, 1 if the split is even. The
    first time and every tenth time after it, a TensorBoard logger also gets the image ``train/stages``.

    Times require a strategy that is a :class:`~lightning_pipelite.shared.protocol.TimesStages`. Under any other, each
    rank counts as a stage of its own, and only its memory is logged. Ranks communicate only in steps that are logged.
    """

    _steps: LoggedSteps

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = LoggedSteps(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(trainer.strategy, TimesStages):
            trainer.strategy.measure_stage_times = logs_now(trainer)  # for the step that this batch belongs to

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._steps.ended(trainer):
            return
        stages = _by_stage(gathered(_own(trainer)))
        for name, value in _metrics(stages).items():
            pl_module.log(name, value, batch_size=1)
        if self._steps.every(PICTURE_EVERY) and trainer.is_global_zero:
            self._draw(trainer, stages)

    @staticmethod
    def _draw(trainer: pl.Trainer, stages: Mapping[int, Sequence[StageState]]) -> None:
        times = {number: each for number, states in stages.items() if (each := _times(states)) is not None}
        for logger in trainer.loggers if len(times) > 1 else ():
            if isinstance(logger, TensorBoardLogger):
                picture = stage_bars(times)
                logger.experiment.add_image("train/stages", picture, trainer.global_step, dataformats="HWC")


def _own(trainer: pl.Trainer) -> StageState:
    strategy, device = trainer.strategy, trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    if not isinstance(strategy, TimesStages):
        return StageState(trainer.global_rank, None, None, memory)
    busy, waiting = strategy.stage_times or (None, None)
    return StageState(strategy.stage_id, busy, waiting, memory)


def _by_stage(states: Sequence[StageState]) -> dict[int, list[StageState]]:
    stages: dict[int, list[StageState]] = {}
    for state in sorted(states, key=lambda state: state.stage):
        stages.setdefault(state.stage, []).append(state)
    return stages


def _times(states: Sequence[StageState]) -> tuple[float, float] | None:
    """Return the busy and waiting seconds of a stage, averaged over its replicas."""
    known = [(state.busy, state.waiting) for state in states if state.busy is not None and state.waiting is not None]
    if not known:
        return None
    busy, waiting = (sum(each) / len(known) for each in zip(*known, strict=True))
    return busy, waiting


def _metrics(stages: Mapping[int, Sequence[StageState]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    busy: list[float] = []
    for number, states in stages.items():
        metrics[f"stage_memory_gib/{number}"] = max(state.memory for state in states) / 2**30
        if (times := _times(states)) is not None:
            metrics[f"stage_busy_s/{number}"], metrics[f"stage_waiting_s/{number}"] = times
            busy.append(times[0])
    if len(busy) == len(stages) and sum(busy) > 0:
        metrics["train/stage_imbalance"] = max(busy) * len(busy) / sum(busy)
    return metrics
