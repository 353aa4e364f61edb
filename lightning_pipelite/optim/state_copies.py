"""Asynchronous copies of optimizer state between a GPU and host memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, as torch's allocator aligns


class Place(NamedTuple):
    """A device buffer that holds the state of one bucket of parameters after another."""

    memory: Tensor
    came: torch.cuda.Event
    left: torch.cuda.Event


class StateCopies:
    """Copies state to a GPU and back, on two streams of its own.

    The host waits only in :meth:`settle`: copies wait on the device, for a free place and for the computation.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._places: Iterator[Place] = iter(())

    def begin(self, places: int, size: int) -> None:
        """Start a step: allocate ``places`` places of ``size`` bytes each; see :func:`bytes_in_place`."""
        memory = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(places)]
        self._in.wait_stream(torch.cuda.current_stream(self._device))  # which may still use this memory
        self._in.wait_stream(self._out)  # state must have left in the last step before it is copied in again
        for each in memory:
            each.record_stream(self._in)
            each.record_stream(self._out)
        self._places = itertools.cycle([Place(each, torch.cuda.Event(), torch.cuda.Event()) for each in memory])

    def bring(self, held: Sequence[Tensor]) -> tuple[list[Tensor], Place]:
        """Start copying state into the next place once that is free; return the state there, and the place."""
        place = next(self._places)
        self._in.wait_event(place.left)
        arrived = []
        start = 0
        with torch.cuda.stream(self._in):
            for tensor in held:
                there = place.memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                arrived.append(there.copy_(tensor, non_blocking=True))
                start += _aligned(tensor)
            place.came.record()
        return arrived, place

    def await_arrival(self, place: Place) -> None:
        """Make work launched from now on wait until the state has arrived."""
        torch.cuda.current_stream(self._device).wait_event(place.came)

    def take_back(self, tensors: Sequence[Tensor], held: Sequence[Tensor], place: Place | None) -> None:
        """Copy state to the host after all work launched so far; its place, if it has one, is free after that."""
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for tensor, waiting in zip(tensors, held, strict=True):
                waiting.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._out)
            if place is not None:
                place.left.record()

    def end(self) -> None:
        """Release the places; their memory is reused once the last state has left."""
        self._places = iter(())

    def settle(self) -> None:
        """Block the host until everything has left, as it must before it reads state."""
        self._out.synchronize()


def bytes_in_place(tensors: Sequence[Tensor]) -> int:
    """Return the size in bytes of a place for these tensors."""
    return sum(map(_aligned, tensors))


def _aligned(tensor: Tensor) -> int:
    return math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
