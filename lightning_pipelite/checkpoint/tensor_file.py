"""A safetensors file whose data is gathered in host memory first and written later.

The format is an unsigned 64-bit little-endian header length, the JSON header, and the data
(https://github.com/huggingface/safetensors#format). The library's ``save_file`` would copy every tensor once more and
hold Python's interpreter lock while it writes, which stops the training that goes on beside it, and the file would have
to be read again to be hashed. It is the library that reads.
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

    The memory is kept for the next copy. For a GPU's tensors it is page-locked: such a copy runs several times as fast.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False
        self._header = b""
        self._size = 0

    def reserve(self, size: int) -> None:
        """Have ``size`` bytes ready: page-locking takes about as long as several copies."""
        if self._memory.numel() >= size:
            return
        self.release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self._device.type == "cuda":
            # Not pin_memory(): that rounds every allocation up to a power of two.
            result = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            self._locked = int(result) == 0  # else it is merely slower

    def release(self) -> None:
        """Give the memory back."""
        if self._locked:
            self.finish()  # if what was to be done meanwhile has failed
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._locked = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy ``tensors``; they may be changed after :meth:`finish`.

        Raises:
            ConfigurationError: If one is of a dtype that the format does not have.
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
        """Return when all has been copied."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def write(self, path: Path) -> Written:
        """Write what was taken, down to the disk."""
        return write_file(path, self._header, memoryview(self._memory.numpy()[: self._size]))


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of host memory that a copy of ``tensors`` takes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _layout(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]], int]:
    """Where each tensor stands; those with the widest items first, so that each is aligned."""
    places: dict[str, dict[str, Any]] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ConfigurationError(f"the checkpoint cannot hold {name}: safetensors has no {tensor.dtype}.")
        start, end = end, end + tensor.nbytes
        places[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return places, end
