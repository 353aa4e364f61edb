"""Transfers of tensors between ranks that overlap with the computation."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_pipelite.strategy.channel_setup import Channels
from lightning_pipelite.strategy.copy_channels import ChannelEnd
from lightning_pipelite.strategy.schedule import Way


def let_streams_run_beside() -> None:
    """Give a GPU as many hardware queues as it can have; to be called before it is used.

    By default, all streams of a process share eight. With a stream for each way, and those of the computation, of
    replicas and of offloaded inputs, there are more than that: a transfer that waits for its other end would block
    everything else in its queue.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class GroupEnd:
    """Sends or receives over a process group of two ranks; NCCL uses kernels for it.

    Args:
        ranks: Both ranks, the same on both; every rank of the job must create every group.
        timeout: How long a rank waits for the other.
    """

    def __init__(self, ranks: list[int], timeout: timedelta) -> None:
        self._group: Any = dist.new_group(ranks, timeout=timeout, pg_options=_one_thread_block(timeout))

    def send(self, tensor: Tensor) -> Any:
        """Start sending a contiguous tensor, which must not change until it is sent."""
        return dist.isend(tensor, group=self._group, group_dst=1 - self._group.rank())

    def receive(self, tensor: Tensor) -> Any:
        """Start receiving into a contiguous tensor."""
        return dist.irecv(tensor, group=self._group, group_src=1 - self._group.rank())


def _one_thread_block(timeout: timedelta) -> Any:
    """Return NCCL's options for a way, or None for another backend.

    A transfer that waits for its other end occupies thread blocks on the GPU, several by default, which the computation
    beside it then lacks.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout  # or torch warns that it differs from new_group's
    options.config.min_ctas = options.config.max_ctas = 1
    return options


@dataclass(frozen=True)
class Shapes:
    """What a piece hands on: the shape and dtype of each tensor, and whether it is one tensor rather than a tuple."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    single: bool

    @classmethod
    def of(cls, outputs: Tensor | tuple[Tensor, ...]) -> Shapes:
        """Record the shapes and dtypes of what a stage returns."""
        tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
        return cls(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors), isinstance(outputs, Tensor))

    def of_gradients(self) -> Shapes:
        """Return what comes back: a gradient for each floating-point tensor."""
        return Shapes(tuple(tensor for tensor in self.tensors if tensor[1].is_floating_point), single=False)


class Arrival:
    """Tensors that are being received.

    Args:
        tensors: The tensors to receive into.
        works: The handles of the transfers.
    """

    def __init__(self, tensors: list[Tensor], works: list[Any]) -> None:
        self._tensors, self._works = tensors, works

    def wait(self) -> list[Tensor]:
        """Return the tensors; on a GPU, the current stream waits for them, not the host."""
        for work in self._works:
            work.wait()
        return self._tensors


class Transfers:
    """The ways between neighbours in a ring of ranks: activations go to the next rank, gradients to the one before.

    Transfers on one way arrive in the order in which they were sent, and never wait for those on another. Between GPUs
    of one host, each way is a channel if channels work there; otherwise it is a communicator with a stream of its own,
    because NCCL runs what shares one in order. Constructing it is collective over all ranks.

    Args:
        pipelines: The global ranks of every pipeline, in the order of their stages.
        rank: This process's global rank.
        device: Where tensors are received.
        timeout: How long a rank waits for the others.
    """

    def __init__(self, pipelines: Sequence[Sequence[int]], rank: int, device: torch.device, timeout: timedelta) -> None:
        self._device = device
        self._sent: list[tuple[Any, Tensor]] = []
        links = {
            ((place, end, backward), (ranks[place], ranks[end], backward))
            for ranks in pipelines
            for place in range(len(ranks))
            for end, backward in (((place + 1) % len(ranks), False), ((place - 1) % len(ranks), True))
        }
        self._channels = None
        if device.type == "cuda":
            self._channels = Channels([link for _, link in links], rank, device)
        self._ends: dict[Way, ChannelEnd | GroupEnd] = {}
        for way, link in sorted(links, key=lambda both: both[1]):  # every rank must take part in creating every group
            connected = self._channels is not None and link in self._channels.connected
            group = None if connected else GroupEnd(sorted(link[:2]), timeout)
            if rank in link[:2]:
                self._ends[way] = group or self._channels.ends[link]  # type: ignore[union-attr]

    def close(self) -> None:
        """Release the memory that is shared between processes."""
        if self._channels is not None:
            self._channels.close()

    def send_shapes(self, shapes: Shapes, way: Way) -> None:
        """Send the other end the shapes of what will follow."""
        told = torch.frombuffer(bytearray(pickle.dumps(shapes)), dtype=torch.uint8).to(self._device)
        self.send([torch.tensor([len(told)], device=self._device), told], way)

    def receive_shapes(self, way: Way) -> Shapes:
        """Wait for the shapes that the other end sends."""
        (length,) = self._receive([((1,), torch.int64)], way).wait()
        (told,) = self._receive([((int(length),), torch.uint8)], way).wait()
        shapes: Shapes = pickle.loads(told.cpu().numpy().tobytes())
        return shapes

    def send(self, tensors: Sequence[Tensor], way: Way) -> None:
        """Start sending; the tensors are kept alive until they are sent, and must not change until then.

        Args:
            tensors: Contiguous, on the device.
            way: From which stage to which, and whether they are gradients.
        """
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]
        for tensor in tensors:
            self._sent.append((self._ends[way].send(tensor.detach()), tensor))

    def receive(self, shapes: Shapes, way: Way) -> Arrival:
        """Start receiving.

        Args:
            shapes: The shapes of what is sent.
            way: From which stage to which, and whether they are gradients.
        """
        return self._receive(shapes.tensors, way)

    def _receive(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], way: Way) -> Arrival:
        tensors = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in shapes]
        return Arrival(tensors, [self._ends[way].receive(tensor) for tensor in tensors])

    def finish(self) -> None:
        """Wait until everything is sent; on a GPU, the stream waits."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []
