"""Directories that are being written, told from those that a killed process has left."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_in(parent: Path) -> Iterator[None]:
    """Let no other process, or thread, come between what is done to the entries of a directory.

    Not to be nested. On a file system without locks it does nothing.
    """
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_locked(directory: Path) -> int:
    """Make a directory, locked as long as this process lives, or until the returned descriptor is closed.

    Nobody who asks :func:`is_abandoned` sees it before it is locked.
    """
    with alone_in(directory.parent):
        directory.mkdir()
        descriptor = os.open(directory, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor


def is_abandoned(directory: Path) -> bool:
    """Whether nobody holds the lock of a directory; false if that cannot be told."""
    try:
        with alone_in(directory.parent):
            return _can_be_locked(directory)
    except OSError:
        return False


def _can_be_locked(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
    return True
