"""What has been written is on the disk, not only in the system's memory."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Bring a file, or the entries of a directory, to the disk.

    Raises:
        OSError: If it cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
