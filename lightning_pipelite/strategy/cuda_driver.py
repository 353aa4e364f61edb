"""CUDA driver functions that torch does not offer: memory shared between processes, and streams that wait on it.

They are called through cuda.bindings, on which torch's CUDA builds depend. Addresses are integers, valid in this
process only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _call(name: str, *args: Any) -> Any:
    """Call a driver function.

    Raises:
        RuntimeError: If it fails, or the bindings are missing or do not match.
    """
    try:
        from cuda.bindings import driver

        code, *results = getattr(driver, name)(*args)
    except (ImportError, AttributeError, TypeError) as error:
        raise RuntimeError(f"{name} of the CUDA driver cannot be called: {error}") from error
    if int(code) != 0:
        raise RuntimeError(f"{name}: {code.name}")
    return results[0] if len(results) == 1 else results


def get_ready(device: torch.device) -> None:
    """Do now, before any stream waits, what would synchronise the device later, such as creating torch's stream pool.

    Without this, two processes on two H200s did not get through tests/strategy/test_channels.py.

    Raises:
        RuntimeError: If :func:`copy` does not work; it requires CUDA 12.8 or later.
    """
    source, to = (torch.full((1024,), value, device=device) for value in (1.0, 0.0))  # sets this thread's CUDA context
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    copy(to.data_ptr(), source.data_ptr(), source.nbytes, stream)
    torch.cuda.synchronize(device)
    if not torch.equal(to, source):
        raise RuntimeError("cuMemcpyBatchAsync did not copy the data correctly")


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that nothing else uses, since torch deals out the same 32 over and over.

    It has the highest priority. While it waits it would hold up other streams in the same hardware queue of the GPU;
    those have lower priorities, and so are in other queues.
    """
    non_blocking = 1
    _, highest = _call("cuCtxGetStreamPriorityRange")
    return torch.cuda.ExternalStream(int(_call("cuStreamCreateWithPriority", non_blocking, highest)), device)


def destroy_stream(stream: torch.cuda.Stream) -> None:
    """Undo :func:`new_stream`."""
    _call("cuStreamDestroy", stream.cuda_stream)


def register(memory: Tensor) -> int:
    """Make host memory accessible to the GPU, and return its GPU address."""
    portable_and_mapped = 3
    _call("cuMemHostRegister", memory.data_ptr(), memory.nbytes, portable_and_mapped)
    return int(_call("cuMemHostGetDevicePointer", memory.data_ptr(), 0))


def unregister(memory: Tensor) -> None:
    """Undo :func:`register`."""
    _call("cuMemHostUnregister", memory.data_ptr())


def copy(to: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
    """Copy bytes in stream order, by a copy engine.

    This uses ``cuMemcpyBatchAsync``, with which it was measured; nothing else has been shown to work behind a wait.
    """
    try:
        from cuda.bindings import driver

        how = driver.CUmemcpyAttributes()
        how.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        how.flags = int(driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
        ends = [[driver.CUdeviceptr(address)] for address in (to, source)]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(f"the CUDA driver's bindings do not support batched copies: {error}") from error
    _call("cuMemcpyBatchAsync", *ends, [size], 1, [how], [0], 1, stream.cuda_stream)


def write_value(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Write a 32-bit number once all earlier work in the stream is done and visible everywhere."""
    _call("cuStreamWriteValue32", stream.cuda_stream, address, value % 2**32, 0)


def wait_value(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Make the stream wait, without a kernel, until a number has reached a value or is less than 2**31 beyond it."""
    at_least = 0
    _call("cuStreamWaitValue32", stream.cuda_stream, address, value % 2**32, at_least)
