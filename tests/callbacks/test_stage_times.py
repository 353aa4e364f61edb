"""The times and the memory of each stage, as logged for an uneven pipeline."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.callbacks import StageTimes
from lightning_pipelite.callbacks.support.stage_bars import BAR, BUSY, GAP, LEFT, RIGHT, WAITING, WIDTH, stage_bars
from processes import Workers

SLOW, MICRO_BATCHES = 0.02, 4


class Slow(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        time.sleep(SLOW)
        return inputs


class Uneven(L.LightningModule):
    """A module whose second half is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), Slow())

    def pipeline_layers(self) -> Any:
        return list(self.layers), nn.functional.cross_entropy

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Measured(L.Callback):
    """Records in which steps the strategy was asked to measure."""

    def __init__(self) -> None:
        self.steps: list[bool] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.steps.append(trainer.strategy.stage_times is not None)


class Reports(PipeLiteStrategy):
    """Reports 1 s busy and 4 s waiting on rank 0, and 2 s and 8 s on rank 1, instead of what was measured."""

    @property
    def stage_times(self) -> tuple[float, float] | None:
        number = self.global_rank + 1
        return (1.0 * number, 4.0 * number) if super().stage_times else None


def train(
    directory: str, stages: int, ranks: int, every: int, kind: type[PipeLiteStrategy] = PipeLiteStrategy
) -> tuple[dict[str, float], list[bool]]:
    """Train four steps; return what was logged last, and which steps were measured."""
    number = 4 * MICRO_BATCHES * ranks
    rows = TensorDataset(torch.linspace(-1, 1, 4 * number).view(number, 4), torch.zeros(number).long())
    loggers = [TensorBoardLogger(directory, "tb", 0), CSVLogger(directory, "csv", 0)]
    measured = Measured()
    trainer = L.Trainer(
        strategy=kind(pipeline_stages=stages),
        accelerator="cpu",
        devices=ranks,
        max_steps=4,
        accumulate_grad_batches=MICRO_BATCHES,
        log_every_n_steps=every,
        logger=loggers,
        callbacks=[StageTimes(), measured],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Uneven(), DataLoader(rows))
    names = ("stage_", "train/stage")
    return {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith(names)}, measured.steps


def test_two_stages(workers: Workers, tmp_path: Path) -> None:
    (metrics, measured), other = workers.run(2, train, str(tmp_path), 2, 2, 2)
    assert other == (metrics, measured)  # the same on every rank
    assert measured == [False, True, False, True]  # only logged steps
    work = SLOW * MICRO_BATCHES
    assert metrics["stage_busy_s/1"] >= work > metrics["stage_busy_s/0"]
    assert metrics["stage_waiting_s/0"] > work / 2
    assert metrics["train/stage_imbalance"] == pytest.approx(
        2 * metrics["stage_busy_s/1"] / (metrics["stage_busy_s/0"] + metrics["stage_busy_s/1"]), rel=1e-5
    )
    assert 0.05 < metrics["stage_memory_gib/0"] < 20
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"), size_guidance={"images": 0}).Reload()
    assert events.Scalars("stage_busy_s/1")[-1].value == pytest.approx(metrics["stage_busy_s/1"])
    assert len(events.Images("train/stages")) == 1
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["stage_waiting_s/0"]) == pytest.approx(metrics["stage_waiting_s/0"])
    assert float(rows[-1]["train/loss"]) > 0


def test_replicas_are_averaged_and_one_stage_needs_no_picture(workers: Workers, tmp_path: Path) -> None:
    (metrics, _), _ = workers.run(2, train, str(tmp_path), 1, 2, 4, Reports)
    assert metrics.keys() == {"stage_busy_s/0", "stage_waiting_s/0", "stage_memory_gib/0", "train/stage_imbalance"}
    assert (metrics["stage_busy_s/0"], metrics["stage_waiting_s/0"]) == (1.5, 6)
    assert metrics["train/stage_imbalance"] == 1
    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    assert "train/stages" not in events.Tags()["images"]


def test_memory_alone_under_another_strategy(tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        log_every_n_steps=1,
        callbacks=[StageTimes()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Uneven(), DataLoader(TensorDataset(torch.randn(1, 4), torch.zeros(1).long())))
    assert [name for name in trainer.logged_metrics if name.startswith("stage")] == ["stage_memory_gib/0"]


def test_the_picture() -> None:
    picture = stage_bars({0: (1.0, 3.0), 1: (4.0, 0.0)})
    first, second = (picture[GAP + row * (BAR + GAP) + 1, LEFT : LEFT + WIDTH] for row in (0, 1))
    busy = [int((row == BUSY).all(-1).sum()) for row in (first, second)]
    assert busy[0] == pytest.approx(WIDTH / 4, abs=2)
    assert busy[1] == WIDTH
    assert int((first == WAITING).all(-1).sum()) == WIDTH - busy[0]
    assert picture.dtype == np.uint8


def test_what_stands_beside_a_bar_is_whole() -> None:
    """Nothing is drawn in the last columns, which text that was cut off would reach."""
    picture = stage_bars({0: (12345.6, 3.456e-5), 11: (1.5, 12345.6)})
    assert picture.shape[1] > LEFT + WIDTH + RIGHT
    assert (picture[:, -3:] == 255).all()
