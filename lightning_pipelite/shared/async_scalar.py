"""Scalars on the host, without unnecessary synchronisation with the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AsyncScalar:
    """A copy to the host that waits only for work queued on the device before it, not after it.

    Args:
        tensor: The tensor to read.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def value(self) -> Any:
        """Return the value, a number or a list of numbers, as soon as it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


def on_host(number: float) -> Tensor:
    """Return a number to be logged as a CPU tensor; Lightning would make one on the GPU, which blocks the host."""
    return torch.tensor(number, dtype=torch.float32)
