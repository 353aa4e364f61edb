"""A safetensors file whose data is first copied to host memory and written later.

The format is an unsigned 64-bit little-endian header length, the JSON header, and the data
(https://github.com/huggingface/safetensors#format). The library's ``save_file`` would copy every tensor once more and
hold the GIL while writing, which would stall the training running in parallel, and the file would have to be read again
to be hashed. Reading does use the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.checkpoint.written_file import Written, write_file
from lightning_pipelite.errors import ConfigurationError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class HostCopy:
    """Tensors copied to host memory, in the order in which the file holds them.

    The memory is reused for the next copy. For a GPU's tensors it is page-locked, so the copy is several times as fast.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False
        self._header = b""
        self._size = 0

    def reserve(self, size: int) -> None:
        """Allocate ``size`` bytes in advance: page-locking takes about as long as several copies."""
        if self._memory.numel() >= size:
            return
        self.release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self._device.type == "cuda":
            # Not pin_memory(), which rounds every allocation up to a power of two.
            result = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            self._locked = int(result) == 0  # otherwise copies are just slower

    def release(self) -> None:
        """Free the memory."""
        if self._locked:
            self.finish()  # after a failure a copy may still be in flight
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._locked = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Start to copy ``tensors``, which must not change before :meth:`finish` returns.

        Raises:
            ConfigurationError: If the format does not support the dtype of one of them.
        """
        places, self._size = _layout(tensors)
        self.reserve(self._size)
        for name, place in places.items():
            start, stop = place["data_offsets"]
            tensor = tensors[name]
            self._memory[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
        header = json.dumps(places, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header

    def finish(self) -> None:
        """Wait until everything has been copied."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def write(self, path: Path) -> Written:
        """Write the copied tensors and sync the file to disk."""
        return write_file(path, self._header, memoryview(self._memory.numpy()[: self._size]))


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the host memory that a copy of ``tensors`` takes, in bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _layout(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the header entries of the tensors, widest dtypes first so that each is aligned, and the data's size."""
    places: dict[str, dict[str, Any]] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ConfigurationError(f"the checkpoint cannot hold {name}: safetensors does not support {tensor.dtype}.")
        start, end = end, end + tensor.nbytes
        places[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return places, end
