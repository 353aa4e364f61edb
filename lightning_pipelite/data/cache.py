"""Cache entries: directories that either exist complete or not at all, even if a build is interrupted."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.fsync import fsync

_TOKENIZER_SUFFIXES = {".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".vocab", ".bpe", ".merges"}


def default_cache_dir() -> Path:
    """Return this package's folder in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_pipelite"


def content_key(contents: dict[str, Any]) -> str:
    """Hash a JSON-serialisable description to 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:32]


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Identify a data file without reading it: its path, size in bytes, and modification time in nanoseconds."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def tokenizer_stamp(directory: Path) -> dict[str, str]:
    """Hash each file that a tokenizer is loaded from, by name; weights and their index are ignored."""
    folders = (directory, directory / "additional_chat_templates")  # transformers keeps non-default templates there
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in _TOKENIZER_SUFFIXES and not file.name.endswith(".index.json")
    }


def build_once(cache_dir: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the entry for a key, building it first if it is missing.

    `build` fills a temporary directory, which an atomic rename moves into place once it is complete. A file lock
    ensures that only one process per host builds; if two hosts build at once, the first to finish wins.

    Args:
        cache_dir: Directory of all entries; created if missing.
        key: The entry's name.
        build: Writes the entry into the empty directory that it is passed.

    Returns:
        The entry's directory.

    Raises:
        ConfigurationError: If the directory cannot be written, or its disk is full. Other entries are left untouched.
    """
    entry = cache_dir / key
    if entry.is_dir():
        return entry
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{key}.lock"):
            if not entry.is_dir():
                _build(entry, build)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigurationError(
                f"The disk of {cache_dir} is full: free space there, or set data.cache_dir."
            ) from error
        raise ConfigurationError(
            f"The cache directory {cache_dir} cannot be used ({error.strerror or error}): set data.cache_dir to a "
            "writable directory."
        ) from error
    return entry


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    ours = f"{entry.name}.{socket.gethostname()}"
    for leftover in entry.parent.iterdir():
        # Left by a build that was killed: we hold this host's lock, so no process is using it. The whole hostname is
        # compared, because a dotted one may start with that of another host, whose build may be running.
        if leftover.name.rpartition(".")[0] == ours:
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = entry.parent / f"{ours}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        build(temporary)
        for file in temporary.rglob("*"):
            fsync(file)
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # otherwise another host finished first, with the same content
                raise
        fsync(entry.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel when the process ends, even if it is killed
        yield
