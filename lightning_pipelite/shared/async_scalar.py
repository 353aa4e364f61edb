"""Numbers of the host, without making it wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AsyncScalar:
    """A copy to the host that need not wait for what the device is given after it.

    Args:
        tensor: What is to be read.
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
        """Return it, a number or a list of numbers, as soon as it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


def on_host(number: float) -> Tensor:
    """Return a number to be logged as a tensor; Lightning would make one on the GPU, for which the host waits."""
    return torch.tensor(number, dtype=torch.float32)
