"""Locks that distinguish directories being written from those that a killed process has left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_in(parent: Path) -> Iterator[None]:
    """Lock a directory while its entries are changed, against other processes and threads that do the same.

    Must not be nested. On a file system without locks it does nothing.
    """
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_locked(directory: Path) -> int:
    """Make a directory that is locked while this process lives, or until the returned descriptor is closed.

    :func:`is_abandoned` never sees it before it is locked.
    """
    with alone_in(directory.parent):
        directory.mkdir()
        descriptor = os.open(directory, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor


def is_abandoned(directory: Path) -> bool:
    """Tell whether no process holds the lock of a directory; False if that cannot be determined."""
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
