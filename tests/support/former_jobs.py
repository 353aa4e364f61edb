"""Trainings in a directory where an earlier one has left files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_pipelite.callbacks import SaveTrained, TimedCheckpoint
from lightning_pipelite.errors import ConfigurationError
from stage_jobs import Catchable, Module, trainer_for
from stage_models import Model, floats, linears


class Saving(Module):
    """Saves what it has trained to a file."""

    def save_trained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "trained").write_text(str(self.trainer.global_step))

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # used by Lightning's own strategies
        inputs, targets = batch
        for layer in self.layers:
            inputs = layer(inputs)
        return self.model.loss(inputs, targets)


class Remembers(DataLoader):
    """A loader with a state dict, which always starts at the beginning of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def fit(folder: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run fits in order; return for each its refusal, and the files with their contents afterwards."""
    return [_fit(Path(folder), **job) for job in jobs]


def _fit(
    folder: Path,
    callback: str = "none",
    ckpt_path: str | None = None,
    overwrite: bool = False,
    logger: str = "none",
    plain: bool = False,
    frozen: bool = False,
    brings_averages: bool = False,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(1)
    module = Saving(Model(linears(2), floats(4)))
    if brings_averages:
        module.configure_callbacks = lambda: [EMAWeightAveraging()]  # type: ignore[method-assign]
    if frozen:
        module.requires_grad_(False)
    callbacks: dict[str, list[L.Callback]] = {
        "trained": [SaveTrained(str(folder / "out"), overwrite)],
        "timed": [TimedCheckpoint(dirpath=str(folder / "checkpoints"), overwrite=overwrite)],
        "scheduled": [
            GradientAccumulationScheduler({0: 1, 1: 2}),
            TimedCheckpoint(dirpath=str(folder / "checkpoints")),
        ],
        "lightning's": [ModelCheckpoint(folder / "lightning", "name")],
        "none": [],
    }
    loggers: dict[str, Any] = {
        "none": False,
        "board": TensorBoardLogger(folder / "logs", "deep/down"),
        "csv": CSVLogger(folder / "logs", "", "fixed"),
        "both": [TensorBoardLogger(folder / "logs", "board"), CSVLogger(folder / "logs", "csv")],
    }
    strategy: Any = "auto" if plain else Catchable(1)
    trainer = trainer_for(
        strategy, 1, callbacks=callbacks[callback], logger=loggers[logger], num_sanity_val_steps=0,
        enable_checkpointing=callback in ("timed", "scheduled", "lightning's"), log_every_n_steps=1,
        **{"max_epochs": 1, **options},
    )  # fmt: skip
    data: Any = Remembers(module.model.batches, batch_size=None)  # type: ignore[arg-type]
    refused = ""
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except ConfigurationError as error:
        refused = str(error)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    trained = folder / "out" / "trained"
    return {
        "refused": refused, "found": sorted(found), "steps": trainer.global_step,
        "trained": trained.read_text() if trained.exists() else None,
    }  # fmt: skip
