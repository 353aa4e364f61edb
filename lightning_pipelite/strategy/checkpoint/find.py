"""Which checkpoint the user means, found out before a process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_pipelite.strategy.checkpoint.manifest import read_manifest
from lightning_pipelite.strategy.checkpoint.reader import check_whole, located, newest


def find_checkpoint(trainer: pl.Trainer, ckpt_path: Any, checks: bool) -> Any:
    """Resolve ``ckpt_path="last"``, and hold what was found or named against its manifest.

    Args:
        trainer: whose ModelCheckpoints tell where to look.
        ckpt_path: of ``Trainer.fit``.
        checks: whether to read all of the files, which one process of a job is enough for.

    Returns:
        The newest whole checkpoint instead of "last"; else ``ckpt_path`` as it is.

    Raises:
        ConfigurationError: if the checkpoint is not whole, or none of several.
    """
    if ckpt_path is None or str(ckpt_path) in ("best", "hpc"):
        return ckpt_path
    if ckpt_path != "last":
        path = located(Path(ckpt_path))
        (check_whole if checks else read_manifest)(path)
        return ckpt_path
    callbacks = trainer.checkpoint_callbacks
    directories = {Path(str(c.dirpath)) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
    found, passed_over = newest(sorted(directories))
    for sentence in passed_over:
        rank_zero_warn(f"ckpt_path: {sentence}; it is passed over for {found}.")
    return ckpt_path if found is None else str(found)
