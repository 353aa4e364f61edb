"""Copies of an optimizer's state between a GPU and the host's memory, beside the computation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, as torch's allocator aligns


class Place(NamedTuple):
    """Memory of the device that holds the state of some parameters after others."""

    memory: Tensor
    came: torch.cuda.Event
    left: torch.cuda.Event


class StateCopies:
    """Brings state to a GPU, and takes it back, on two streams of its own.

    The host waits for nothing but :meth:`settle`: copies wait on the device, for places and for what is computed there.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._places: Iterator[Place] = iter(())

    def begin(self, places: int, size: int) -> None:
        """Start a step: make so many places of ``size`` bytes, see :func:`bytes_in_place`."""
        memory = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(places)]
        self._in.wait_stream(torch.cuda.current_stream(self._device))  # whose memory it may have been
        self._in.wait_stream(self._out)  # what has left in the step before comes again
        for each in memory:
            each.record_stream(self._in)
            each.record_stream(self._out)
        self._places = itertools.cycle([Place(each, torch.cuda.Event(), torch.cuda.Event()) for each in memory])

    def bring(self, held: Sequence[Tensor]) -> tuple[list[Tensor], Place]:
        """Start to copy state into the next place, once what was there has left; return it, and the place."""
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
        """Make what is launched from now on wait until the state is there."""
        torch.cuda.current_stream(self._device).wait_event(place.came)

    def take_back(self, tensors: Sequence[Tensor], held: Sequence[Tensor], place: Place | None) -> None:
        """Copy state to the host once what is launched now is done; its place, if it had one, is free after that."""
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for tensor, waiting in zip(tensors, held, strict=True):
                waiting.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._out)
            if place is not None:
                place.left.record()

    def end(self) -> None:
        """Give the places back, for what is computed after the last of the state has left."""
        self._places = iter(())

    def settle(self) -> None:
        """Wait until everything has left, as the host must before it reads state."""
        self._out.synchronize()


def bytes_in_place(tensors: Sequence[Tensor]) -> int:
    """Return how many bytes a place of all of them has."""
    return sum(map(_aligned, tensors))


def _aligned(tensor: Tensor) -> int:
    return math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
