"""Results of an earlier training where a new one would write its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import KeepsResults


def refuse_former_results(trainer: pl.Trainer, ckpt_path: Any) -> None:
    """Refuse to start a training from scratch where an earlier one has left its results.

    A callback that replaces what it finds is a :class:`~lightning_pipelite.shared.protocol.KeepsResults`. Lightning's
    ModelCheckpoint need not be one: it numbers its files, unless it is configured to replace them.

    Args:
        trainer: Its callbacks and loggers determine where results are written.
        ckpt_path: The argument of ``Trainer.fit``; a resumed training continues its own results.

    Raises:
        ConfigurationError: Naming the first result that would be lost.
    """
    if trainer.fast_dev_run or _resumes(trainer, ckpt_path):  # type: ignore[attr-defined]
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, KeepsResults) and (sentence := callback.former_result()):
            raise ConfigurationError(sentence)
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and logger._experiment is None:
            metrics = Path(logger.log_dir) / "metrics.csv"  # by default each run has a directory of its own
            if metrics.exists():
                raise ConfigurationError(
                    f"CSVLogger: {metrics} exists and would be deleted; move it, choose another version, or leave "
                    "the version out."
                )


def _resumes(trainer: pl.Trainer, ckpt_path: Any) -> bool:
    """Whether Lightning resumes: with a Trainer that has trained, or from a checkpoint, even one it finds itself."""
    if ckpt_path is not None or trainer.global_step > 0:
        return True
    if SLURMEnvironment.detect() and trainer._checkpoint_connector._hpc_resume_path is not None:
        return True
    found = [each for each in trainer.callbacks if isinstance(each, OnExceptionCheckpoint)]  # type: ignore[attr-defined]
    return any(Path(each.ckpt_path).exists() for each in found)
