"""A new file, down to the disk, and what the manifest says of it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Written:
    """What the manifest says of a file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


def write_file(path: Path, *parts: bytes | memoryview) -> Written:
    """Write a new file down to the disk, hashed on the way.

    Raises:
        OSError: If that fails; what was written is left behind.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            while view:  # both calls let other threads run
                written = file.write(view[:_CHUNK])
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())
