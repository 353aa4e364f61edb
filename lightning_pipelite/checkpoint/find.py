"""Finds the checkpoint that the user means, before any process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_pipelite.checkpoint.layout import META
from lightning_pipelite.checkpoint.manifest import read_manifest
from lightning_pipelite.checkpoint.named import refuse_last
from lightning_pipelite.checkpoint.reader import check_whole, located, newest, read_json
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.local_path import refuse_remote


def find_checkpoint(trainer: pl.Trainer, ckpt_path: Any, checks: bool) -> Any:
    """Resolve ``ckpt_path="last"``, and check the checkpoint found or named against its manifest.

    Args:
        trainer: Trainer whose ModelCheckpoints say where to look.
        ckpt_path: Argument of ``Trainer.fit``.
        checks: Whether to read and hash all files of a named checkpoint; one process of a job is enough for that.

    Returns:
        The newest intact checkpoint for "last", if there is one; otherwise ``ckpt_path`` unchanged.

    Raises:
        ConfigurationError: If the named checkpoint, or every one found, is damaged, or if it is beyond ``max_steps``.
    """
    if ckpt_path is None or str(ckpt_path) in ("best", "hpc"):
        return ckpt_path  # resolved by Lightning
    refuse_remote(ckpt_path, "ckpt_path")
    if ckpt_path != "last":
        path = located(Path(ckpt_path))
        (check_whole if checks else read_manifest)(path)
        _check_limit(trainer, path)
        return ckpt_path
    found, passed_over = newest(_directories(trainer))
    for sentence in passed_over:
        rank_zero_warn(f"ckpt_path: {sentence}; using {found} instead.")
    if found is None:
        return ckpt_path
    _check_limit(trainer, found)
    return str(found)


def require_last(trainer: pl.Trainer) -> None:
    """Refuse ``last`` when there is no checkpoint; from Python this is allowed, as in Lightning.

    Raises:
        ConfigurationError: Naming the directories that were searched.
    """
    directories = _directories(trainer)
    if newest(directories)[0] is None:
        refuse_last(directories)


def _directories(trainer: pl.Trainer) -> list[Path]:
    callbacks = trainer.checkpoint_callbacks
    return sorted({Path(str(c.dirpath)) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath})


def _check_limit(trainer: pl.Trainer, path: Path) -> None:
    """Refuse a checkpoint beyond ``max_steps``: Lightning checks ``max_epochs`` only, and later."""
    step = read_json(path / META)["step"]
    if trainer.state.fn == TrainerFn.FITTING and -1 < trainer.max_steps < step:
        raise ConfigurationError(
            f"ckpt_path: {path} was saved at step {step}, but max_steps is {trainer.max_steps}: set max_steps above "
            f"{step} to continue, or name an earlier checkpoint."
        )
