"""Errors about ``best`` and ``last``, which stand for a checkpoint's directory, without slow imports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_pipelite.errors import ConfigurationError


def refuse_best() -> None:
    """Refuse ``best`` in a process that has not trained anything.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        "ckpt_path: only the process that has trained knows which checkpoint is best; name its directory, or "
        "`last` for the newest one. (TimedCheckpoint with a monitor keeps the best beside the newest.)"
    )


def refuse_last(directories: Sequence[Path]) -> None:
    """Refuse ``last`` when there is no checkpoint.

    Args:
        directories: The directories that were searched.

    Raises:
        ConfigurationError: Always.
    """
    where = " or ".join(map(str, directories))
    raise ConfigurationError(
        f"ckpt_path: there is no checkpoint in {where} for `last`; leave ckpt_path out to begin anew."
        if where
        else "ckpt_path: no callback says where to look for `last`: add the TimedCheckpoint, or the "
        "ModelCheckpoint with its dirpath, of the training that is to go on; or name the checkpoint's directory."
    )
