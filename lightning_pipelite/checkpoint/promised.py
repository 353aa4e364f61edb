"""The file system as it will be when all that is promised is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class PromisedFiles:
    """Stands before a callback's file system (fsspec's), and answers ``exists`` for what is under way.

    Checkpoints are written and removed in the background. Lightning's ModelCheckpoint takes a name that is not there
    for free, so that a second one in the same folder would take the first one's name, and each delete the other's.

    Args:
        files: The callback's own.
        promised: For a path, whether it will be there; None if nothing is under way with it.
    """

    def __init__(self, files: Any, promised: Callable[[Path], bool | None]) -> None:
        self._files, self._promised = files, promised

    def exists(self, path: Any, **options: Any) -> bool:
        """Tell whether a path exists, or is a checkpoint that is being written."""
        promised = self._promised(Path(os.path.realpath(path)))  # of a link: what it leads to
        return bool(self._files.exists(path, **options)) if promised is None else promised

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def see_promises(callbacks: Iterable[pl.Callback], promised: Callable[[Path], bool | None]) -> Callable[[], None]:
    """Let all ModelCheckpoints see what is promised, after their ``setup``; return what puts their own back."""
    seeing = [(callback, callback._fs) for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for callback, files in seeing:
        callback._fs = PromisedFiles(files, promised)

    def put_back() -> None:
        for callback, files in seeing:
            callback._fs = files

    return put_back
