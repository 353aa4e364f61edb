"""What the CUDA driver offers and torch does not: memory shared between processes, and streams that wait for it.

Through cuda.bindings, on which torch's CUDA builds depend. Addresses are integers, valid in this process alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _call(name: str, *args: Any) -> Any:
    """Call the driver.

    Raises:
        RuntimeError: If it fails, or there are no bindings, or others.
    """
    try:
        from cuda.bindings import driver

        code, *results = getattr(driver, name)(*args)
    except (ImportError, AttributeError, TypeError) as error:
        raise RuntimeError(f"{name} of the CUDA driver cannot be called: {error}") from error
    if int(code) != 0:
        raise RuntimeError(f"{name}: {code.name}")
    return results[0] if len(results) == 1 else results


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that nobody else has, as torch deals out the same 32 again and again.

    It has the highest priority: streams of others, of which a waiting one would hold up those in the same queue of the
    GPU, have lower ones, and so are in other queues.
    """
    non_blocking = 1
    _, highest = _call("cuCtxGetStreamPriorityRange")
    return torch.cuda.ExternalStream(int(_call("cuStreamCreateWithPriority", non_blocking, highest)), device)


def destroy_stream(stream: torch.cuda.Stream) -> None:
    """Undo :func:`new_stream`."""
    _call("cuStreamDestroy", stream.cuda_stream)


def register(memory: Tensor) -> int:
    """Let the GPU reach memory of the host, and return where."""
    portable_and_mapped = 3
    _call("cuMemHostRegister", memory.data_ptr(), memory.nbytes, portable_and_mapped)
    return int(_call("cuMemHostGetDevicePointer", memory.data_ptr(), 0))


def unregister(memory: Tensor) -> None:
    """Undo :func:`register`."""
    _call("cuMemHostUnregister", memory.data_ptr())


def copy(to: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
    """Copy bytes between a GPU and the host in the order of the stream, by a copy engine."""
    _call("cuMemcpyAsync", to, source, size, stream.cuda_stream)


def write_value(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Write a 32-bit number once all that was before it in the stream is done and can be seen everywhere."""
    _call("cuStreamWriteValue32", stream.cuda_stream, address, value % 2**32, 0)


def wait_value(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Let the stream wait, without a kernel, until a number has come to a value, or is less than 2**31 beyond it."""
    at_least = 0
    _call("cuStreamWaitValue32", stream.cuda_stream, address, value % 2**32, at_least)
