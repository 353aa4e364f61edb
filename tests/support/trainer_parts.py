"""The building blocks of the rows in trainer_rows.py: data, callbacks and schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

BATCH = 4
Callbacks = Callable[[Path], list[Any]]
"""Creates callbacks, given the folder of a row."""


def rows(number: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(number, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Stream(IterableDataset[Any]):
    """Rows without a known length."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([rows(self.number)[index] for index in range(self.number)])


def loader(batches: int = 6, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows(BATCH * batches), batch_size=BATCH, **options)


def stream(batches: int = 6) -> DataLoader[Any]:
    return DataLoader(Stream(BATCH * batches), batch_size=BATCH)


class Data(L.LightningDataModule):
    """A data module whose loaders grow with the epochs, so that reloading them shows."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(4 + self.trainer.current_epoch)  # type: ignore[union-attr]

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(1 + self.trainer.current_epoch)  # type: ignore[union-attr]


class StopAfter(L.Callback):
    """Stops after a number of batches over the whole training, or in another hook of that batch."""

    def __init__(self, batch: int, hook: str = "on_train_batch_end") -> None:
        self.batch = batch
        setattr(self, hook, self._stop)

    def _stop(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.fit_loop.total_batch_idx + 1 >= self.batch


class FaultError(RuntimeError):
    """What :class:`Raise` raises."""


class Raise(L.Callback):
    """Raises in a batch, counted over the whole training."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            raise FaultError


class SaveAt(L.Callback):
    """Saves after given batches, counted over the whole training."""

    def __init__(self, folder: Path, *batches: int) -> None:
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (batch := trainer.fit_loop.total_batch_idx + 1) in self.batches:
            trainer.save_checkpoint(self.folder / f"{batch}.ckpt")


def scheduled(make: Callable[[Any, Any], Any], **how: Any) -> dict[str, Any]:
    """Return the module's options for a learning-rate scheduler."""

    def configured(optimizer: Any, trainer: Any) -> Any:
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer, trainer), **how}}

    return {"scheduler": configured}


def saving(*args: Any, **options: Any) -> Callbacks:
    return lambda folder: [ModelCheckpoint(*args, **options)]


def step_lr(optimizer: Any, _: Any) -> Any:
    return lr_scheduler.StepLR(optimizer, 1, 0.8)


def plateau(optimizer: Any, _: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)


def one_cycle(optimizer: Any, trainer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=trainer.estimated_stepping_batches)


def two_schedulers(optimizer: Any, trainer: Any) -> Any:
    return [optimizer], [{"scheduler": step_lr(optimizer, trainer), "interval": "step", "frequency": 3},
                         {"scheduler": step_lr(optimizer, trainer), "interval": "epoch", "name": "slow"}]  # fmt: skip
