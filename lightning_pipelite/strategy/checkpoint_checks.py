"""Checks of the callbacks that save checkpoints, made before any process is started."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.local_path import refuse_remote


def check_checkpoint_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks whose checkpoints would not be saved where, or when, they are configured to be.

    Raises:
        ConfigurationError: For the first such callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, Checkpoint):
            continue
        kind = type(callback).__name__
        directory = getattr(callback, "dirpath", None)
        if directory is None and isinstance(callback, ModelCheckpoint):  # it then uses the first logger's
            directory = (trainer.loggers[0].save_dir if trainer.loggers else None) or trainer.default_root_dir
        refuse_remote(directory, f"{kind}: dirpath")
        on_exception = isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False)
        if on_exception and trainer.world_size > 1:
            option = "" if isinstance(callback, OnExceptionCheckpoint) else "(save_on_exception=True)"
            raise ConfigurationError(
                f"{kind}{option} can only be used with a single process: when one of several fails, the others cannot "
                "write their part of a checkpoint; use lightning_pipelite.callbacks.TimedCheckpoint, which saves at "
                "time intervals, on SIGTERM and on request."
            )
