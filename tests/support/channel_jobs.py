"""Ranks that send each other tensors through channels."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import fake_cuda_driver
from lightning_pipelite.strategy import channel_setup, channel_trial, copy_channels
from lightning_pipelite.strategy.channel_setup import Channels
from lightning_pipelite.strategy.links import Link

LENGTHS = [1, 7, 100, 0, 33, 64, 65, 129, 200, 3]
"""Lengths of the tensors sent, in float32 elements; a slot of the fake driver holds 16."""


def round_trips(fault: str | None, variables: list[dict[str, str]], times: int = 1) -> dict[str, Any]:
    """Set up channels between the neighbours in a ring, and send tensors over each that begins or ends here.

    Args:
        fault: Fault of the fake driver; None for the real driver.
        variables: Environment variables of each rank. HOST replaces the name of its shared memory.
        times: How often to do it, one after the other.

    Returns:
        The links of all ranks that have a channel, whether this rank received exactly what was sent, and the new files
        in shared memory.
    """
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ.update(variables[rank] if rank < len(variables) else {})
    device = torch.device("cuda" if fault is None else "cpu")
    links = [(place, (place + step) % ranks, step < 0) for place in range(ranks) for step in (1, -1)]
    before = _files()
    dist.barrier()
    connected, right = [], True
    with contextlib.ExitStack() as stack:
        if fault is not None:
            stack.enter_context(fake_cuda_driver.installed(fault))
            for module in (channel_setup, channel_trial, copy_channels):
                stack.enter_context(mock.patch.object(module, "SLOT", 64))
            stack.enter_context(mock.patch.object(channel_trial, "SECONDS", 3.0))
        if "HOST" in os.environ:
            stack.enter_context(mock.patch.object(channel_setup, "_token", return_value=os.environ["HOST"]))
        for _ in range(times):
            channels = Channels(links, rank, device)
            right &= _travel(channels, links, rank, device)
            connected = sorted(channels.connected)
            channels.close()
    dist.barrier()
    return {"connected": connected, "right": right, "files": _files() - before}


def _travel(channels: Channels, links: list[Link], rank: int, device: torch.device) -> bool:
    works, came, held = [], [], []
    for link, end in sorted(channels.ends.items()):
        generator = torch.Generator().manual_seed(links.index(link))
        tensors = [torch.rand(length, generator=generator).to(device) for length in LENGTHS]
        held += tensors  # keep them alive until they are sent
        if link[0] == rank:
            works += [end.send(tensor) for tensor in tensors]
        else:
            empty = [torch.zeros_like(tensor) for tensor in tensors]
            works += [end.receive(tensor) for tensor in empty]
            came += zip(tensors, empty, strict=True)
    for work in works:
        work.done.synchronize()
    dist.barrier()
    return all(torch.equal(sent, got) for sent, got in came)


def _files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("pipelite-*")}
