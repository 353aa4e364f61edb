"""Offloads tensors saved for the backward pass to host memory; copies overlap with computation in both directions."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

AHEAD = 3  # layers that the host may be ahead of the GPU


@dataclass(eq=False)
class _Copy:
    """One tensor on its way to the host or back.

    Attributes:
        host: Page-locked buffer.
        written: Recorded after the copy to the host.
        device: The copy brought back to the GPU; None if there is none.
        back: Recorded after the copy back.
    """

    host: Tensor
    written: torch.cuda.Event
    device: Tensor | None = None
    back: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class HostCopies:
    """Keeps chosen tensors that autograd saves in page-locked host memory.

    Copies run on two streams of their own, one for each direction, so that they overlap with computation. The backward
    pass uses the tensors in reverse order: when it unpacks one, the copy of the one saved before it is started too.
    Host buffers are reused; there are as many as were needed at once. The GPU holds no more than two tensors that have
    been brought back, plus those that wait to be copied or used: memory that a second stream uses is freed only when
    the GPU, not the host, is done with it. The host is therefore kept from running more than a few layers ahead.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._kept: list[_Copy] = []  # in the order in which they were saved
        self._free: list[tuple[Tensor, torch.cuda.Event]] = []  # buffers, and events recorded after they were read
        self._leaving: deque[torch.cuda.Event] = deque()  # recorded after each of the last few copies to the host
        self._used: deque[torch.cuda.Event] = deque()  # recorded as each of the last few was unpacked

    def of(self, chosen: Tensor) -> AbstractContextManager[Any]:
        """Return a context in which ``chosen`` is kept in host memory if autograd saves it."""
        place, shape, dtype = chosen.data_ptr(), chosen.shape, chosen.dtype  # not the tensor: autograd keeps the hook

        def pack(tensor: Tensor) -> Any:
            # By address, as autograd passes another tensor on the same memory. This runs for every saved tensor.
            found = tensor.data_ptr() == place and tensor.shape == shape and tensor.dtype == dtype
            return self._keep(tensor) if found else tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _keep(self, tensor: Tensor) -> _Copy:
        _wait_for_all_but_a_few(self._leaving)
        copy = _Copy(self._buffer(tensor), torch.cuda.Event())
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            copy.host.copy_(tensor, non_blocking=True)
            copy.written.record()
        tensor.record_stream(self._out)  # its memory is not reused before the copy is done
        self._kept.append(copy)
        self._leaving.append(copy.written)
        return copy

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Copy):
            return packed
        current = torch.cuda.current_stream(self._device)
        self._used.append(current.record_event())
        _wait_for_all_but_a_few(self._used)
        if packed.device is None:
            self._bring_back(packed)
        place = self._kept.index(packed)
        if place > 0 and self._kept[place - 1].device is None:
            self._bring_back(self._kept[place - 1])
        tensor, packed.device = packed.device, None
        assert tensor is not None
        current.wait_event(packed.back)
        tensor.record_stream(current)
        del self._kept[place]
        self._free.append((packed.host, packed.back))
        return tensor

    def _bring_back(self, copy: _Copy) -> None:
        self._in.wait_event(copy.written)
        with torch.cuda.stream(self._in):
            copy.device = copy.host.to(self._device, non_blocking=True)
            copy.back.record()

    def _buffer(self, like: Tensor) -> Tensor:
        for place, (buffer, read) in enumerate(self._free):
            if buffer.shape == like.shape and buffer.dtype == like.dtype:
                self._out.wait_event(read)
                del self._free[place]
                return buffer
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _wait_for_all_but_a_few(events: deque[torch.cuda.Event]) -> None:
    while len(events) > AHEAD:
        events.popleft().synchronize()
