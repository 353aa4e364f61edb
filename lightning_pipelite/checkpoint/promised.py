"""A view of the file system as it will be once all pending work is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class PromisedFiles:
    """Wraps a callback's file system (fsspec) so that ``exists`` accounts for pending writes and removals.

    Checkpoints are written and removed in the background. Lightning's ModelCheckpoint considers a name free if it does
    not exist, so a second one in the same directory would take the first one's name, and each would delete the other's.

    Args:
        files: The callback's own file system.
        promised: Returns whether a path will exist; None if nothing is pending for it.
    """

    def __init__(self, files: Any, promised: Callable[[Path], bool | None]) -> None:
        self._files, self._promised = files, promised

    def exists(self, path: Any, **options: Any) -> bool:
        """Return whether a path exists, or will once pending work is done."""
        promised = self._promised(Path(os.path.realpath(path)))  # a link counts as its target
        return bool(self._files.exists(path, **options)) if promised is None else promised

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def see_promises(callbacks: Iterable[pl.Callback], promised: Callable[[Path], bool | None]) -> Callable[[], None]:
    """Wrap the file systems of all ModelCheckpoints, after their ``setup``; return a function that undoes this."""
    seeing = [(callback, callback._fs) for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for callback, files in seeing:
        callback._fs = PromisedFiles(files, promised)

    def put_back() -> None:
        for callback, files in seeing:
            callback._fs = files

    return put_back
