"""Transfers between the GPUs of one host by their copy engines, which take nothing away from the computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pipelite.strategy import cuda_driver

SLOTS, SLOT = 2, 16 * 2**20
"""Slots of a channel, and bytes of each: while one part of a tensor is copied out, the next is copied in."""


_RELEASED: list[object] = []
"""Objects kept alive for good, since a GPU that did not do as instructed may still access them at any time."""


@dataclass(frozen=True)
class Channel:
    """Memory through which one process's GPU passes tensors to another's, in order; addresses are this process's.

    Attributes:
        slots: GPU address of the slots, in host memory.
        counts: GPU address of two 32-bit counts in host memory: of the parts put in, and 128 bytes further on, since
            two processes write them, of the parts taken out.
        host: The counts as the host sees them, int32.
    """

    slots: int
    counts: int
    host: Tensor

    @property
    def arrived(self) -> int:
        """The address of the count of parts put in."""
        return self.counts

    @property
    def taken(self) -> int:
        """The address of the count of parts taken out."""
        return self.counts + 128


@dataclass(frozen=True)
class Copies:
    """Copies in progress, used like the ``Work`` objects that torch returns for transfers.

    Attributes:
        done: The event after the last of them.
    """

    done: torch.cuda.Event

    def is_completed(self) -> bool:
        """Whether the copies are complete."""
        return self.done.query()

    def wait(self) -> None:
        """Make the current stream wait for the copies."""
        torch.cuda.current_stream().wait_event(self.done)


class ChannelEnd:
    """Puts tensors into a channel, or takes them out, while the GPU computes.

    An NCCL transfer is a kernel, and occupies multiprocessors of the GPU even while it only waits for its peer. A
    matrix product that counts on all of them, as cuBLAS's do on an H200, then takes up to 11 % longer. Here the GPU's
    front end waits for a number in host memory, and its copy engine copies.

    Args:
        channel: The channel; its other end belongs to another process.
        stream: A stream for this end alone.
    """

    def __init__(self, channel: Channel, stream: torch.cuda.Stream) -> None:
        self._channel, self._stream = channel, stream
        self._count = 0  # parts so far

    def send(self, tensor: Tensor) -> Copies:
        """Start sending a contiguous GPU tensor, which must not change until it is sent."""
        for address, slot, size in self._parts(tensor):
            cuda_driver.wait_value(self._channel.taken, self._count - SLOTS, self._stream)
            cuda_driver.copy(slot, address, size, self._stream)
            cuda_driver.write_value(self._channel.arrived, self._count, self._stream)
        return Copies(self._stream.record_event())

    def receive(self, tensor: Tensor) -> Copies:
        """Start receiving into a contiguous GPU tensor."""
        for address, slot, size in self._parts(tensor):
            cuda_driver.wait_value(self._channel.arrived, self._count, self._stream)
            cuda_driver.copy(address, slot, size, self._stream)
            cuda_driver.write_value(self._channel.taken, self._count, self._stream)
        return Copies(self._stream.record_event())

    def release(self, *used: Tensor) -> None:
        """End all waits of the GPU for good: this end has failed, so the other one is not used either.

        Args:
            used: Tensors that the GPU may still copy from or to.
        """
        self._channel.host[:] = 2**30
        _RELEASED.append((self._channel, used, self._stream))

    def is_idle(self) -> bool:
        """Whether the GPU has finished everything queued on this end."""
        return self._stream.query()

    def close(self) -> None:
        """Destroy the stream, which must be idle."""
        cuda_driver.destroy_stream(self._stream)

    def _parts(self, tensor: Tensor) -> Iterator[tuple[int, int, int]]:
        """Count each part of a tensor, and yield its address, its slot's address and its size in bytes."""
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        for start in range(0, tensor.nbytes, SLOT):
            slot = self._channel.slots + self._count % SLOTS * SLOT
            self._count += 1
            yield tensor.data_ptr() + start, slot, min(SLOT, tensor.nbytes - start)
