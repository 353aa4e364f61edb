"""Collects the stages' tensors in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_pipelite.shared.topology import Topology


def collect_stages(
    tensors: dict[str, Tensor], topology: Topology, rank: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Bring the tensors of every stage to rank 0, one stage at a time, to be written. Collective.

    Args:
        tensors: The tensors of this rank's stage, by name; only the first replica's are sent.
        topology: The job's topology.
        rank: The global rank of this process.
        device: The device of the process group's tensors.

    Returns:
        On rank 0 an iterator that yields each stage's tensors in host memory and must be exhausted; elsewhere an empty
        one.
    """
    if rank == 0:
        return _receive(tensors, topology, device)
    if topology.replica_of(rank) == 0:
        described = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
        dist.send_object_list([described], dst=0, device=device)
        for tensor in tensors.values():
            dist.send(tensor.detach().to(device).contiguous(), dst=0)
    return iter(())


def _receive(tensors: dict[str, Tensor], topology: Topology, device: torch.device) -> Iterator[dict[str, Tensor]]:
    yield {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    for stage in range(1, topology.stages):
        source = topology.rank_of(stage, 0)
        described: list[Any] = [None]
        dist.recv_object_list(described, src=source, device=device)
        received = {}
        for name, shape, dtype in described[0]:
            buffer = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(buffer, src=source)
            received[name] = buffer.cpu()
        yield received
