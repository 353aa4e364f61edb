"""Keeps what the backward pass needs in the host's memory, copied beside the computation in both directions."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

AHEAD = 3  # layers


@dataclass(eq=False)
class _Copy:
    """One tensor on its way to the host or back.

    Attributes:
        host: page-locked.
        written: When it is there.
        device: What has been brought back.
        back: When it is.
    """

    host: Tensor
    written: torch.cuda.Event
    device: Tensor | None = None
    back: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class HostCopies:
    """Keeps chosen tensors that autograd saves in page-locked host memory.

    The copies run on two streams of their own, one for each direction, so that they hide behind the computation.
    As one is used in the backward pass, the copy of the one saved before it is already started: the backward pass
    goes through them in the opposite order. Host buffers are used again; there are as many as were needed at once, and
    on the GPU no more than two tensors that have been brought back. Beside these there is what waits to be copied or
    used: memory that a second stream uses is free again when the GPU, not the host, is done with it. So the host may
    not be ahead of the GPU by more than a few layers.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._kept: list[_Copy] = []  # in the order in which they were saved
        self._free: list[tuple[Tensor, torch.cuda.Event]] = []  # buffers, and when they have been read
        self._leaving: deque[torch.cuda.Event] = deque()  # when the last few will have been copied
        self._used: deque[torch.cuda.Event] = deque()  # when those before the last few will have been used

    def of(self, chosen: Tensor) -> AbstractContextManager[Any]:
        """Keep ``chosen`` in host memory, within this context, where autograd saves it."""
        place, shape, dtype = chosen.data_ptr(), chosen.shape, chosen.dtype  # and not itself: autograd keeps the hook

        def pack(tensor: Tensor) -> Any:
            # By its place, as autograd hands over another tensor of the same memory; it is asked of every tensor saved.
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
        tensor.record_stream(self._out)  # its memory is not used again before that
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
