"""Host memory that several processes and their GPUs can access."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from lightning_pipelite.strategy import cuda_driver

_FOLDER = "/dev/shm"


class SharedMemory:
    """Host memory under a name.

    Args:
        size: The size in bytes.
        path: The file in ``/dev/shm`` that names existing memory; None creates new memory, filled with zeros.

    Attributes:
        path: The file.
        host: The bytes, uint8.
        address: The GPU's address of the memory.

    Raises:
        OSError: If there is no such memory, or too little.
        RuntimeError: If the GPU cannot access it.
    """

    def __init__(self, size: int, path: str | None = None) -> None:
        own = path is None
        if path is None:
            descriptor, path = tempfile.mkstemp(prefix="pipelite-", dir=_FOLDER)
            try:
                os.posix_fallocate(descriptor, 0, size)  # or a shortage would only show when it is written to
            except OSError:
                Path(path).unlink()
                raise
            finally:
                os.close(descriptor)
        elif not Path(path).is_file():  # torch would create it
            raise FileNotFoundError(path)
        self.path = path
        try:
            self.host = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            self.address = cuda_driver.register(self.host)
        except BaseException:
            if own:
                self.forget_name()
            raise

    def forget_name(self) -> None:
        """Remove the name, so that no other process can open it; called by the process that created it."""
        Path(self.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Release it; this process and its GPU must not use it any more, others may."""
        cuda_driver.unregister(self.host)
        del self.host
