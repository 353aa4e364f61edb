"""Transfers between the GPUs of one host by their copy engines, which take nothing from the computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pipelite.strategy import cuda_driver

SLOTS, SLOT = 2, 16 * 2**20
"""How many parts of tensors a channel holds, and of how many bytes: while one is taken out the next comes in."""


@dataclass(frozen=True)
class Channel:
    """Memory through which one process's GPU hands tensors to another's, in order; by one process's addresses.

    Attributes:
        slots: Where the parts lie: on the receiver's GPU, or on the host.
        arrived: Where it is counted how many parts have been put in, on the host; 32 bits.
        taken: Where it is counted how many have been taken out, on the host; 32 bits.
    """

    slots: int
    arrived: int
    taken: int


@dataclass(frozen=True)
class Copies:
    """Copies under way, to be used as torch's works of transfers are.

    Attributes:
        done: When they have been made.
    """

    done: torch.cuda.Event

    def is_completed(self) -> bool:
        """Whether they have been made."""
        return self.done.query()

    def wait(self) -> None:
        """Let what the current stream does next wait for them."""
        torch.cuda.current_stream().wait_event(self.done)


class ChannelEnd:
    """Puts tensors into a channel, or takes them out, beside the computation.

    A transfer by NCCL is a kernel, and holds processors of the GPU, also where it only waits for its other end. A
    product of matrices that counts on all of them, as cuBLAS's do on an H200, takes longer for it: up to 11 %. Here the
    GPU's front end waits, for a number in the host's memory, and its copy engine copies.

    Args:
        channel: The other end of which another process has.
        stream: For this end alone.
    """

    def __init__(self, channel: Channel, stream: torch.cuda.Stream) -> None:
        self._channel, self._stream = channel, stream
        self._count = 0  # of parts

    def send(self, tensor: Tensor) -> Copies:
        """Start to send a contiguous tensor of the GPU, which must not change until it is sent."""
        for address, slot, size in self._parts(tensor):
            cuda_driver.wait_value(self._channel.taken, self._count - SLOTS, self._stream)
            cuda_driver.copy(slot, address, size, self._stream)
            cuda_driver.write_value(self._channel.arrived, self._count, self._stream)
        return Copies(self._stream.record_event())

    def receive(self, tensor: Tensor) -> Copies:
        """Start to receive into a contiguous tensor of the GPU."""
        for address, slot, size in self._parts(tensor):
            cuda_driver.wait_value(self._channel.arrived, self._count, self._stream)
            cuda_driver.copy(address, slot, size, self._stream)
            cuda_driver.write_value(self._channel.taken, self._count, self._stream)
        return Copies(self._stream.record_event())

    def _parts(self, tensor: Tensor) -> Iterator[tuple[int, int, int]]:
        """Yield where each part of a tensor is, which slot is its own, and how many bytes it has; count it."""
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        for start in range(0, tensor.nbytes, SLOT):
            slot = self._channel.slots + self._count % SLOTS * SLOT
            self._count += 1
            yield tensor.data_ptr() + start, slot, min(SLOT, tensor.nbytes - start)
