"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from stat import S_IMODE

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.fsync import fsync
from lightning_pipelite.shared.locks import is_abandoned, make_locked


def refuse_other_content(directory: Path, known_files: Sequence[str]) -> None:
    """Refuse to replace a directory that holds anything else.

    Args:
        directory: An absolute path, which need not exist.
        known_files: Patterns of the names that such a directory may hold.

    Raises:
        ConfigurationError: It exists and is not a directory, or holds something else, which would be lost.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ConfigurationError(f"{directory} exists and is not a plain directory; choose another place to save to.")
    for entry in sorted(directory.iterdir()) if directory.exists() else ():
        if not any(fnmatch(entry.name, pattern) for pattern in known_files):
            raise ConfigurationError(
                f"{directory} holds {entry.name}, which saving would delete; move it or save to another place."
            )


@contextmanager
def whole_directory(directory: Path, known_files: Sequence[str]) -> Iterator[Path]:
    """Yield an empty directory to write in, which replaces ``directory`` once it is complete and on disk.

    Its files get the permissions that the umask allows, whatever library wrote them.

    If an exception is raised inside, ``directory`` is left as it was. Leftovers of killed processes are removed. If the
    machine stops between the two renames at the end, the former content is still intact in ``.<name>.<number>.old``
    beside it.

    Args:
        directory: Where the files are to be; replaced if it exists.
        known_files: Patterns of the names that such a directory may hold.

    Raises:
        ConfigurationError: ``directory`` exists and is not a directory, or holds something else, which would be lost.
    """
    directory = Path(os.path.abspath(directory))  # noqa: PTH100  (resolve() would replace a link's target)
    refuse_other_content(directory, known_files)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".{escape(directory.name)}.????????.partial"):
        if is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    unique = uuid.uuid4().hex[:8]
    partial = directory.with_name(f".{directory.name}.{unique}.partial")
    held = make_locked(partial)
    try:
        yield partial
        mode = S_IMODE(partial.stat().st_mode)
        for path in sorted(partial.rglob("*"), reverse=True):
            _open_to(path, mode if path.is_dir() else mode & 0o666)
            fsync(path)
        fsync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)
        raise
    former = directory.with_name(f".{directory.name}.{unique}.old")
    if directory.exists():
        directory.rename(former)
    partial.rename(directory)
    fsync(directory.parent)
    os.close(held)
    for old in directory.parent.glob(f".{escape(directory.name)}.????????.old"):
        shutil.rmtree(old, ignore_errors=True)


def _open_to(path: Path, mode: int) -> None:
    """Give ``path`` a mode that follows the umask, as the directory's does: safetensors allows only the owner."""
    if S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # on a file system with one mode for all files
            path.chmod(mode)
