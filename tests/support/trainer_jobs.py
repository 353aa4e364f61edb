"""Runs rows of the table under one strategy, and returns what each recorded."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.fabric.utilities import registry
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

from stage_jobs import Catchable
from trainer_parts import FaultError
from trainer_recorder import Net, Recorder, RecordingCallback, RecordingLogger, Weights, files, plain
from trainer_rows import ROWS, Row


def run_row(row: Row, folder: Path, stages: int | None, ranks: int) -> dict[str, Any]:
    """Run a row in an empty folder, under Lightning's DDP if ``stages`` is None."""
    os.chdir(folder)
    parts = []
    if row.before is not None:
        parts.append(_train(row, {**row.trainer, **row.before}, None, folder, stages, ranks))
    parts.append(_train(row, row.trainer, row.ckpt_path, folder, stages, ranks))
    # Rank 0 writes and removes the files; once it is done, the other ranks may be further on.
    return {"parts": parts, "files": files(folder) if os.environ["RANK"] == "0" else None}


def _train(
    row: Row, options: dict[str, Any], ckpt_path: str | None, folder: Path, stages: int | None, ranks: int
) -> dict[str, Any]:
    recorder = Recorder()
    watch, weights, logger = RecordingCallback(), Weights(), RecordingLogger(recorder, folder)
    watch.recorder = recorder
    callbacks = row.callbacks(folder)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
             "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks)}  # fmt: skip
    trainer = L.Trainer(
        strategy="ddp" if stages is None else Catchable(stages), accelerator="cpu", devices=ranks, logger=logger,
        callbacks=[watch, *callbacks, weights], default_root_dir=folder,
        **{"log_every_n_steps": 1, "num_sanity_val_steps": 1, **quiet, **options},
    )  # fmt: skip
    recorder.trainer = trainer
    module, results = Net(recorder, **row.module), []
    data = row.data()
    given = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {
        "train_dataloaders": data[0], "val_dataloaders": data[1]}  # fmt: skip
    if ckpt_path and ckpt_path.endswith(".ckpt"):
        ckpt_path = str(folder / ckpt_path)
    for number, call in enumerate(row.calls):
        if call != "fit":
            best_or_last = call.removeprefix("validate").strip() or None
            results += trainer.validate(module, data[1], best_or_last, verbose=False, weights_only=False)
            continue
        if "fit" in row.calls[:number]:
            trainer.fit_loop.max_epochs = (trainer.max_epochs or 0) + 1
        with suppress(FaultError):
            trainer.fit(module, **given, ckpt_path=ckpt_path, weights_only=False)
    return {
        "events": recorder.events,
        "lines": logger.lines,
        "weights": weights.found,
        "results": plain(results, folder),
        "metrics": plain([trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics], folder),
        "callbacks": plain([each.state_dict() for each in callbacks if not hasattr(each, "time_elapsed")], folder),
        "state": {
            "step": trainer.global_step, "epoch": trainer.current_epoch, "stop": trainer.should_stop,
            "batches": [trainer.num_training_batches, trainer.num_val_batches, trainer.val_check_batch],
            "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
            "batch": trainer.fit_loop.batch_idx, "total": trainer.fit_loop.total_batch_idx,
        },
    }  # fmt: skip


_entry_points = functools.cache(importlib.metadata.entry_points)


@contextmanager
def quickly() -> Iterator[None]:
    """Save a fifth of Lightning's time.

    Lightning searches all installed packages for callbacks for each Trainer, and for each logged value moves all of its
    state to the CPU, where it already is.
    """
    with (
        mock.patch.object(registry, "entry_points", _entry_points),
        mock.patch.object(_ResultMetric, "to", lambda metric, *_: metric),
    ):
        yield


def run_rows(names: list[str], folder: str, stages: int | None, ranks: int) -> dict[str, Any]:
    """Run several rows in this process."""
    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        own = Path(folder) / name.replace("/", " ") / ("ddp" if stages is None else f"{stages} stages") / str(ranks)
        own.mkdir(parents=True, exist_ok=True)
        L.seed_everything(3, verbose=False)
        try:
            with quickly():
                found[name] = run_row(ROWS[name], own.resolve(), stages, ranks)
        except Exception:  # one failing row must not stop the others
            found[name] = {"error": traceback.format_exc()}
        finally:
            torch.use_deterministic_algorithms(False)
            for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
                os.environ.pop(variable, None)
    return found
