"""Which checkpoint the user means, found out before a process is started."""

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
    """Resolve ``ckpt_path="last"``, and hold what was found or named against its manifest.

    Args:
        trainer: Whose ModelCheckpoints tell where to look.
        ckpt_path: Of ``Trainer.fit``.
        checks: Whether to read all of the files, which one process of a job is enough for.

    Returns:
        The newest whole checkpoint instead of "last"; else ``ckpt_path`` as it is.

    Raises:
        ConfigurationError: If the checkpoint is not whole, or none of several.
    """
    if ckpt_path is None or str(ckpt_path) in ("best", "hpc"):
        return ckpt_path  # which Lightning resolves
    refuse_remote(ckpt_path, "ckpt_path")
    if ckpt_path != "last":
        path = located(Path(ckpt_path))
        (check_whole if checks else read_manifest)(path)
        _check_limit(trainer, path)
        return ckpt_path
    found, passed_over = newest(_directories(trainer))
    for sentence in passed_over:
        rank_zero_warn(f"ckpt_path: {sentence}; it is passed over for {found}.")
    if found is None:
        return ckpt_path
    _check_limit(trainer, found)
    return str(found)


def require_last(trainer: pl.Trainer) -> None:
    """Refuse ``last`` where there is no checkpoint; in Python it may mean one if there is one, as in Lightning.

    Raises:
        ConfigurationError: Naming where was looked.
    """
    directories = _directories(trainer)
    if newest(directories)[0] is None:
        refuse_last(directories)


def _directories(trainer: pl.Trainer) -> list[Path]:
    callbacks = trainer.checkpoint_callbacks
    return sorted({Path(str(c.dirpath)) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath})


def _check_limit(trainer: pl.Trainer, path: Path) -> None:
    """Lightning looks at max_epochs only, and later."""
    step = read_json(path / META)["step"]
    if trainer.state.fn == TrainerFn.FITTING and -1 < trainer.max_steps < step:
        raise ConfigurationError(
            f"ckpt_path: {path} is of step {step}, and max_steps is {trainer.max_steps}: give a max_steps above "
            f"{step} to go on, or an earlier checkpoint."
        )
