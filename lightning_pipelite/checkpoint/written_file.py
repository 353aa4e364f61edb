"""Writes a file, synced to disk, and returns its entry for the manifest."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Written:
    """The manifest's entry for a file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


def write_file(path: Path, *parts: bytes | memoryview) -> Written:
    """Write a new file, hash it on the way, and sync it to disk.

    Raises:
        OSError: If that fails; a partial file is left behind.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            while view:  # write and update both release the GIL
                written = file.write(view[:_CHUNK])
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())
