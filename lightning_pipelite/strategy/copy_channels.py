"""Transfers between the GPUs of one host by their copy engines, which take nothing from the computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pipelite.strategy import cuda_driver

SLOTS, SLOT = 2, 16 * 2**20
"""How many parts of tensors a channel holds, and of how many bytes: while one is taken out the next comes in."""


_RELEASED: list[object] = []
"""What a GPU may use at any time that does not do what it was told."""


@dataclass(frozen=True)
class Channel:
    """Memory through which one process's GPU hands tensors to another's, in order; by one process's addresses.

    Attributes:
        slots: Where the parts lie, on the host.
        counts: Where it is counted, on the host, how many parts have been put in, and 128 bytes behind, as two
            processes write, how many have been taken out; 32 bits each.
        host: The same as the host finds it, int32.
    """

    slots: int
    counts: int
    host: Tensor

    @property
    def arrived(self) -> int:
        """Where the first number is."""
        return self.counts

    @property
    def taken(self) -> int:
        """Where the second one is."""
        return self.counts + 128


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

    def release(self, *used: Tensor) -> None:
        """Let the GPU wait no longer, for good: this end has failed, and so the other one is not used either.

        Args:
            used: Tensors that it may still copy from or to.
        """
        self._channel.host[:] = 2**30
        _RELEASED.append((self._channel, used, self._stream))

    def is_idle(self) -> bool:
        """Whether the GPU has done all that it was told."""
        return self._stream.query()

    def close(self) -> None:
        """Give the stream back, once it is idle."""
        cuda_driver.destroy_stream(self._stream)

    def _parts(self, tensor: Tensor) -> Iterator[tuple[int, int, int]]:
        """Yield where each part of a tensor is, which slot is its own, and how many bytes it has; count it."""
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        for start in range(0, tensor.nbytes, SLOT):
            slot = self._channel.slots + self._count % SLOTS * SLOT
            self._count += 1
            yield tensor.data_ptr() + start, slot, min(SLOT, tensor.nbytes - start)
