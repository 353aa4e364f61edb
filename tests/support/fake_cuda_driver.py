"""A fake CUDA driver on the CPU, whose streams are threads.

It can show that processes exchange tensors in order, but not that a GPU behaves as its driver documents.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from lightning_pipelite.strategy import cuda_driver

_seeds = itertools.count()


class Event:
    """An event of a stream."""

    def __init__(self) -> None:
        self._happened = threading.Event()
        self.happen = self._happened.set

    def query(self) -> bool:
        return self._happened.is_set()

    def synchronize(self) -> None:
        assert self._happened.wait(30)


class Stream:
    """Runs actions in order, each with a short random delay."""

    def __init__(self) -> None:
        self._todo: queue.Queue[Callable[[], None]] = queue.Queue()
        self._random = random.Random(next(_seeds))
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, action: Callable[[], None]) -> None:
        self._todo.put(action)

    def query(self) -> bool:
        return self._todo.unfinished_tasks == 0

    def record_event(self) -> Event:
        event = Event()
        self.add(event.happen)
        return event

    def wait_event(self, event: Event) -> None:
        self.add(event.synchronize)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def _work(self) -> None:
        while True:
            action = self._todo.get()
            time.sleep(self._random.choice([0, 0, 1e-4, 1e-3]))
            action()
            self._todo.task_done()


def _number(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address)


def _write_value(address: int, value: int, stream: Stream) -> None:
    def write() -> None:
        _number(address).value = value % 2**32

    stream.add(write)


def _wait_value(address: int, value: int, stream: Stream) -> None:
    def wait() -> None:
        while (_number(address).value - value) % 2**32 >= 2**31:  # negative as a signed 32-bit difference
            time.sleep(1e-5)

    stream.add(wait)


def _copy(to: int, source: int, size: int, stream: Stream) -> None:
    stream.add(lambda: ctypes.memmove(to, source, size) and None)


@contextmanager
def installed(fault: str = "") -> Iterator[Stream]:
    """Make :mod:`lightning_pipelite.strategy.cuda_driver` and torch use this driver.

    Args:
        fault: "none" if no GPU can reach the host's memory, "broken" if copies arrive corrupted, "fails" if they do not
            arrive, "one queue" if a waiting stream blocks all others. With FAKE_DRIVER=old in the environment, there
            are no batched copies.

    Yields:
        The stream that is torch's current one.
    """

    def get_ready(device: torch.device) -> None:
        if os.environ.get("FAKE_DRIVER") == "old":
            raise RuntimeError("cuMemcpyBatchAsync of the CUDA driver cannot be called")

    def register(memory: torch.Tensor) -> int:
        if fault == "none":
            raise RuntimeError("cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED")
        return memory.data_ptr()

    def copy(to: int, source: int, size: int, stream: Stream) -> None:
        if fault == "fails":
            raise RuntimeError("cuMemcpyBatchAsync: CUDA_ERROR_INVALID_VALUE")
        _copy(to, source, size // 2 if fault == "broken" else size, stream)

    def new_stream(device: Any = None) -> Any:
        return current if fault == "one queue" else Stream()

    current = Stream()
    fakes: dict[str, Any] = {
        "get_ready": get_ready,
        "new_stream": new_stream,
        "destroy_stream": lambda stream: None,
        "register": register,
        "unregister": lambda memory: None,
        "copy": copy,
        "write_value": _write_value,
        "wait_value": _wait_value,
    }
    with (
        mock.patch.multiple(cuda_driver, **fakes),
        mock.patch.object(torch.cuda, "current_stream", return_value=current),
        mock.patch.object(torch.cuda, "Stream", return_value=new_stream()),
    ):
        yield current
