"""Tests whether channels work, and whether a GPU can compute while one of them waits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

import torch

from lightning_pipelite.shared.over_ranks import gathered
from lightning_pipelite.strategy.copy_channels import SLOT, ChannelEnd, Copies
from lightning_pipelite.strategy.links import Link, with_both_ends

SECONDS = 20.0
"""Seconds to wait before something that has not arrived counts as broken."""

_POOL = 32
"""The size of torch's pool, from which all streams other than the computation's are dealt out."""


def try_out(ends: Mapping[Link, ChannelEnd], rank: int, device: torch.device) -> set[Link]:
    """Send a known tensor, in three parts, over all channels, and return the links on which it arrived. Collective.

    Every receiver first starts to wait, and then checks that its other streams still run: streams share the hardware
    queues of a GPU, of which there may be few (``CUDA_DEVICE_MAX_CONNECTIONS``), and work queued behind a waiting
    stream does not run. Nothing is sent to a rank whose computation is held up in this way: training would hang.

    Args:
        ends: This rank's ends, not used before.
        rank: This process's global rank.
        device: Its GPU.
    """
    known = torch.arange((2 * SLOT + 4096) // 4, dtype=torch.int32, device=device)
    got = {link: torch.zeros_like(known) for link in ends if link[1] == rank}
    under_way: dict[Link, Copies] = {}
    for link, tensor in got.items():
        with contextlib.suppress(RuntimeError):
            under_way[link] = ends[link].receive(tensor)
    streams = [torch.cuda.current_stream(device), *(torch.cuda.Stream(device) for _ in range(_POOL))]
    events = [stream.record_event() for stream in streams]
    computes = comes(lambda: all(event.query() for event in events))
    expected = set().union(*gathered(set(under_way) if computes else set()))
    for link, end in ends.items():
        if link[0] == rank and link in expected:
            with contextlib.suppress(RuntimeError):
                under_way[link] = end.send(known)
    comes(lambda: all(copies.is_completed() for link, copies in under_way.items() if link in expected))
    done = {link for link, copies in under_way.items() if computes and copies.is_completed()}
    working = with_both_ends(link for link in done if link not in got or torch.equal(got[link], known))
    for link, end in ends.items():
        if link not in working:
            end.release(known, *got.values())
    return working


def comes(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, at most :data:`SECONDS`, and return whether it became true."""
    until = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True
