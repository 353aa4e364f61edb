"""Ranks that hand each other tensors through channels."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import fake_cuda_driver
from lightning_pipelite.strategy import channel_setup, copy_channels
from lightning_pipelite.strategy.channel_setup import connect

LENGTHS = [1, 7, 100, 0, 33, 64, 65, 129, 200, 3]
"""Of the tensors that travel, in float32 numbers, where a slot has room for 16."""


def round_trips(reach: str | None, variables: dict[str, str], slot: int = 64) -> dict[str, Any]:
    """Set channels up between the neighbours of a ring, and send tensors over each that begins or ends here.

    Args:
        reach: Of the fake driver; None for the real one.
        variables: Of the environment.
        slot: Bytes.

    Returns:
        The links of all ranks that have a channel, whether all that came here was what had been sent, and the files of
        shared memory that are left.
    """
    os.environ.update(variables)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name in ("_slots_on_gpu", "_opened_on_gpu", "_stream"):
        getattr(channel_setup, name).cache_clear()
    device = torch.device("cuda" if reach is None else "cpu")
    links = [((place) % ranks, (place + step) % ranks, step < 0) for place in range(ranks) for step in (1, -1)]
    with contextlib.ExitStack() as stack:
        if reach is not None:
            stack.enter_context(fake_cuda_driver.installed(reach))
            for module in (channel_setup, copy_channels):
                stack.enter_context(mock.patch.object(module, "SLOT", slot))
        ends, connected = connect(links, rank, device)
        sent, got = {}, {}
        for link, end in sorted(ends.items()):
            generator = torch.Generator().manual_seed(links.index(link))
            tensors = [torch.rand(length, generator=generator).to(device) for length in LENGTHS]
            if link[0] == rank:
                sent[link] = tensors, [end.send(tensor) for tensor in tensors]
            else:
                empty = [torch.zeros_like(tensor) for tensor in tensors]
                got[link] = tensors, empty, [end.receive(tensor) for tensor in empty]
        for _, works in sent.values():
            for work in works:
                work.done.synchronize()
        right = True
        for tensors, arrived, works in got.values():
            for work in works:
                work.done.synchronize()
            right &= all(torch.equal(a, b) for a, b in zip(tensors, arrived, strict=True))
    return {"connected": sorted(connected), "right": right, "files": _left_over()}


def _left_over() -> list[str]:
    dist.barrier()
    return [path.name for path in Path("/dev/shm").glob("pipelite-*")]
