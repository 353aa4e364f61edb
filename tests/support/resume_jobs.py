"""A training with everything that resuming could get wrong, and a record of all that it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.optim import OffloadedOptimizer
from resumable import Deal
from stage_jobs import Catchable, Module, collected, trainer_for
from stage_models import CLASSES, WIDTH, Batch, Model, token_loss


class Noisy(Deal):
    """Adds random numbers that the process draws for the data, the same on all stages."""

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in super().__iter__():
            yield inputs + torch.rand(()), targets


class Functional(nn.Module):
    """Applies dropout by the function, without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.dropout(torch.tanh(self.linear(inputs)), 0.2, self.training)


class Record(Logger):
    """Records all that is logged, with its step."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str, float]] = []

    name, version = "record", 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines += [(step or 0, key, float(value)) for key, value in sorted(metrics.items())]


class SaveEverywhere(L.Callback):
    """Saves in many hooks, under names that say which."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: L.Trainer, where: str) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            trainer.save_checkpoint(self.folder / f"{where}-{trainer.fit_loop.epoch_loop.total_batch_idx:02d}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "eval")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")


class Scheduled(Module):
    """Also runs under Lightning's own strategies, there without dropout, as they do not restore its generators."""

    offload = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "train/loss")

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "eval/loss")

    def _step(self, batch: Batch, name: str) -> Tensor:
        hidden, targets = batch
        for layer in self.eval().layers:
            hidden = layer(hidden)
        total, count = token_loss(hidden, targets)
        self.log(name, total / count)
        return total / count

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        if self.offload:
            optimizer = OffloadedOptimizer(optimizer)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30), "interval": "step"},
        ]


def make() -> Scheduled:
    torch.manual_seed(5)
    layers: list[nn.Module] = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)),
        Functional(),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
        nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, CLASSES)),
    ]
    batches: list[Batch] = []
    for index in range(10):
        targets = torch.randint(CLASSES, (2, 6))
        targets[:, : index % 5] = -100
        batches.append((torch.randn(2, 6, WIDTH), targets))
    return Scheduled(Model(layers, batches, token_loss))


def train(
    stages: int = 1,
    replicas: int = 1,
    accumulate: int = 2,
    ckpt_path: str | None = None,
    callbacks: tuple[Any, ...] = (),
    seed: int = 11,
    plain: bool = False,
    noisy: bool = True,
    virtual_stages: int = 1,
    offload: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train with ten micro-batches an epoch, and an evaluation within an epoch, after every fourth with one replica."""
    strategy: Any = "auto" if plain else Catchable(stages, virtual_stages=virtual_stages)
    module = make()
    module.offload = offload
    torch.manual_seed(seed)
    record = Record()
    trainer = trainer_for(
        strategy, stages * replicas, accumulate_grad_batches=accumulate, logger=record, log_every_n_steps=1,
        callbacks=[*callbacks], enable_checkpointing=any(isinstance(each, Checkpoint) for each in callbacks),
        **{"max_epochs": 3, "val_check_interval": 2 * accumulate, **options},
    )  # fmt: skip
    rank = {"num_replicas": 1, "rank": 0} if plain else strategy.distributed_sampler_kwargs
    loaders = [(Noisy if noisy else Deal)(module.model.batches, **rank) for _ in range(2)]
    try:
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    except ConfigurationError as error:
        return {"error": str(error)}
    return {
        "lines": record.lines,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "weights": {} if plain else collected(strategy),
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }


def train_and_save(folder: str, *args: Any, **options: Any) -> dict[str, Any]:
    return train(*args, callbacks=(SaveEverywhere(Path(folder)),), **options)


def train_with_model_checkpoint(folder: str, ckpt_path: str | None, steps: int) -> dict[str, Any]:
    saving = ModelCheckpoint(folder, "{step}", monitor="eval/loss", save_top_k=2, save_last=True, every_n_train_steps=2)
    done = train(2, ckpt_path=ckpt_path, callbacks=(saving,), max_steps=steps, max_epochs=-1)
    kept = {Path(path).name for path in (saving.last_model_path, *saving.best_k_models)}
    return {**done, "best": float(saving.best_model_score or 0.0), "kept": kept}


class StopAfter(L.Callback):
    """Stops after a micro-batch, counted from 1 over the whole training."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch


class SaveAtTheEnd(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def train_and_stop(folder: str, saving: str, stop: int | None, resume: bool, **limit: Any) -> dict[str, Any]:
    """Train, saving at the end of each epoch with TimedCheckpoint or Lightning's own, or after training."""
    from lightning_pipelite.callbacks import TimedCheckpoint

    end = f"{folder}/end.ckpt"
    callback: Any = {
        "timed": lambda: TimedCheckpoint(dirpath=folder),
        "lightning": lambda: ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True),
        "end": lambda: SaveAtTheEnd(end),
    }[saving]()
    stopping = (StopAfter(stop),) if stop else ()
    path = (end if saving == "end" else "last") if resume else None
    return train(ckpt_path=path, callbacks=(callback, *stopping), **limit)
