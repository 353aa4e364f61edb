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
        "ckpt_path: `best` is known only to the process that trained the model; name the checkpoint's directory, or "
        "use `last` for the newest one. (TimedCheckpoint with a monitor keeps the best one in addition to the newest.)"
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
        f"ckpt_path: there is no checkpoint in {where} for `last`; leave ckpt_path out to start from scratch."
        if where
        else "ckpt_path: no callback says where to look for `last`: add the TimedCheckpoint, or the "
        "ModelCheckpoint with its dirpath, of the training to resume, or name the checkpoint's directory."
    )
