"""What a checkpoint may be called in place of its directory; nothing long is imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_pipelite.errors import ConfigurationError


def refuse_best() -> None:
    """Refuse ``best`` where nothing has been trained yet.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        "ckpt_path: only the process that has trained knows which checkpoint is best; name its directory, or "
        "`last` for the newest one. (TimedCheckpoint with a monitor keeps the best beside the newest.)"
    )


def refuse_last(directories: Sequence[Path]) -> None:
    """Refuse ``last`` where there is no checkpoint.

    Args:
        directories: Where was looked.

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
