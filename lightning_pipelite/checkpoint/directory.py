"""Directories that are complete or absent: written under a temporary name, renamed, cleaned up after a crash."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lightning_pipelite.shared.fsync import fsync
from lightning_pipelite.shared.locks import alone_in, is_abandoned, make_locked

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.ckpt-(?P<kind>partial|old)")


class PartialDirectory:
    """A directory that is being written, locked while its process lives.

    Leftovers of killed processes beside it are removed first; partial directories of live processes are left alone.

    Args:
        target: Its final path.

    Raises:
        OSError: If it cannot be created.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._unique = uuid.uuid4().hex[:8]
        self.path = target.with_name(f".{target.name}.{self._unique}.ckpt-partial")
        self._lock = -1
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        self._lock = make_locked(self.path)

    def publish(self) -> None:
        """Rename the directory to its final name, replacing what had that name before."""
        os.fsync(self._lock)
        former = self._target.with_name(f".{self._target.name}.{self._unique}.ckpt-old")
        with alone_in(self._target.parent):  # else another process may restore the former one in between
            if replaces := os.path.lexists(self._target):
                self._target.rename(former)
            self.path.rename(self._target)
        fsync(self._target.parent)
        if replaces:
            _remove(former)

    def close(self) -> None:
        """Unlock it, and remove it if it was not published."""
        _remove(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_directory(path: Path) -> None:
    """Remove a published directory so that it is never seen half removed."""
    doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.ckpt-partial")
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        _remove(doomed)


def remove_leftovers(parent: Path) -> None:
    """Remove leftovers of killed processes from ``parent``, and restore what they were about to replace."""
    with alone_in(parent):
        for path, target, is_old in _temporaries(parent):
            if is_old and not os.path.lexists(target):
                path.rename(target)
    for path, target, is_old in _temporaries(parent):
        if os.path.lexists(target) if is_old else is_abandoned(path):
            _remove(path)


def former_of(path: Path) -> Path | None:
    """Return what was called ``path`` before a process was killed between the two renames of a replacement."""
    if not path.parent.is_dir() or os.path.lexists(path):
        return None
    return next((old for old, target, is_old in _temporaries(path.parent) if is_old and target == path), None)


def is_temporary(path: Path) -> bool:
    """Return whether ``path`` has a temporary name, which :func:`remove_leftovers` would handle."""
    return _TEMPORARY.fullmatch(path.name) is not None


def target_of(temporary: Path) -> Path:
    """Return the final path of a temporary directory: its path once published, or before it was replaced."""
    match = _TEMPORARY.fullmatch(temporary.name)
    assert match
    return temporary.with_name(match["name"])


def _temporaries(parent: Path) -> Iterator[tuple[Path, Path, bool]]:
    for path in sorted(parent.iterdir()):
        if is_temporary(path):
            yield path, target_of(path), path.name.endswith("old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
