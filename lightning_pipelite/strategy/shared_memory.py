"""Memory of a host that several of its processes, and their GPUs, reach."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from lightning_pipelite.strategy import cuda_driver

_FOLDER = "/dev/shm"


class SharedMemory:
    """Memory of the host under a name.

    Args:
        size: How many bytes.
        path: The file in memory that is its name; without, new memory, zeros.

    Attributes:
        path: The file.
        host: The bytes, uint8.
        address: Where the GPU finds them.

    Raises:
        OSError: If there is no such memory, or not as much.
        RuntimeError: If the GPU does not reach it.
    """

    def __init__(self, size: int, path: str | None = None) -> None:
        own = path is None
        if path is None:
            descriptor, path = tempfile.mkstemp(prefix="pipelite-", dir=_FOLDER)
            try:
                os.posix_fallocate(descriptor, 0, size)  # or what is missing would be missed when it is written to
            except OSError:
                Path(path).unlink()
                raise
            finally:
                os.close(descriptor)
        elif not Path(path).is_file():  # torch would make one
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
        """Let nobody else open it from now on; for whoever made it."""
        Path(self.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Give it back; neither this process nor its GPU may use it any more, others may."""
        cuda_driver.unregister(self.host)
        del self.host
