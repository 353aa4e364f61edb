"""Directories that are being written, told from those that a killed process has left."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def lock(directory: Path) -> int:
    """Lock a directory as long as this process lives, or until the returned descriptor is closed."""
    descriptor = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_abandoned(directory: Path) -> bool:
    """Whether nobody holds the lock of a directory; false if that cannot be told."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
