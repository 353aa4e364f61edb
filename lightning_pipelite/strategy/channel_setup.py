"""Which ranks of a job have channels between them, and in whose memory."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from lightning_pipelite.strategy import cuda_driver
from lightning_pipelite.strategy.copy_channels import SLOT, SLOTS, Channel, ChannelEnd, Copies
from lightning_pipelite.strategy.shared_memory import SharedMemory

Link = tuple[int, int, bool]
"""From which global rank to which, and whether gradients travel."""

_PAGE, _TOKEN = 4096, 16
"""How many bytes a receiver has for its counts; the last tell them from another host's memory of the same name."""

_SECONDS = 20.0
"""After which a channel that is tried out counts as out of order."""

_cannot = contextlib.suppress(OSError, RuntimeError)  # another host, GPUs out of each other's reach, too little memory


def connect(links: Collection[Link], rank: int, device: torch.device) -> tuple[dict[Link, ChannelEnd], set[Link]]:
    """Set up channels between the ranks that share a host, and try them out. Collective over all ranks.

    The slots are on the receiver's GPU, or else in the host's memory: many consumer GPUs don't reach each other's
    memory, and on some boards what goes from one to the other arrives broken. As with NCCL, ``NCCL_P2P_DISABLE=1``
    leaves out the former, and ``NCCL_SHM_DISABLE=1`` all memory that processes share, and so every channel.

    Args:
        links: Of the whole job; at most one of activations and one of gradients end at a rank.
        rank: This process's global rank.
        device: Its GPU.

    Returns:
        This rank's ends, and the links of all ranks that have a channel, the same on every rank.
    """
    pages = _pages(links, rank)
    ends: dict[Link, ChannelEnd] = {}
    connected: set[Link] = set()
    memories: list[_OnGPU | _OnHost] = [_OnGPU(device), _OnHost()]
    for attempt, memory in enumerate(memories):
        mine = [link for link in links if rank in link[:2] and link not in connected and link[1] in pages]
        slots = _slots(mine, rank, memory)
        for link in _both(slots):
            if rank in link[:2]:
                first = pages[link[1]].address + 1024 * attempt + 256 * link[2]
                channel = Channel(slots[link], first, first + 128)  # apart, as two processes count
                ends[link] = ChannelEnd(channel, _stream(device, link[0] == rank, link[2], attempt))
        connected |= _both(_tried_out({link: ends[link] for link in mine if link in ends}, rank, device))
        ends = {link: end for link, end in ends.items() if link in connected}
    return ends, connected


def _pages(links: Collection[Link], rank: int) -> dict[int, SharedMemory]:
    """Return where this rank counts what arrives, and where those do to which it sends, by rank. Collective."""
    pages: dict[int, SharedMemory] = {}
    with _cannot:
        if not _disabled("NCCL_SHM_DISABLE"):
            pages[rank] = SharedMemory(_PAGE)
            pages[rank].host[-_TOKEN:] = torch.frombuffer(bytearray(secrets.token_bytes(_TOKEN)), dtype=torch.uint8)
    told = _gathered((pages[rank].path, _token(pages[rank])) if pages else None)
    for peer in {link[1] for link in links if link[0] == rank and rank in pages and told[link[1]]}:
        with _cannot:
            path, token = told[peer]
            page = SharedMemory(_PAGE, path)
            if _token(page) == token:
                pages[peer] = page
    _gathered(None)  # by when all have opened what they can
    if rank in pages:
        pages[rank].forget_name()
    return pages


def _token(page: SharedMemory) -> bytes:
    return bytes(page.host[-_TOKEN:].tolist())


class _OnGPU:
    """Slots on the receiver's GPU, once a process: memory that another has opened cannot be freed safely."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self, link: Link) -> tuple[int, Any]:
        """Return the receiver's address, and what the sender is told."""
        if _disabled("NCCL_P2P_DISABLE"):
            raise RuntimeError("GPUs are not to write into each other's memory")
        slots = _slots_on_gpu(self._device, link[2])
        return slots, cuda_driver.handle_of(slots)

    def open(self, told: Any) -> int:
        """Return the sender's address."""
        return _opened_on_gpu(told)

    def all_have_opened(self) -> None:
        """Nothing more is opened."""


class _OnHost:
    """Slots in memory of the host."""

    def __init__(self) -> None:
        self._made: list[SharedMemory] = []

    def make(self, link: Link) -> tuple[int, Any]:
        """Return the receiver's address, and what the sender is told."""
        self._made.append(SharedMemory(SLOTS * SLOT))
        return self._made[-1].address, self._made[-1].path

    def open(self, told: Any) -> int:
        """Return the sender's address."""
        return SharedMemory(SLOTS * SLOT, told).address

    def all_have_opened(self) -> None:
        """Nothing more is opened."""
        for memory in self._made:
            memory.forget_name()


def _slots(links: Iterable[Link], rank: int, memory: _OnGPU | _OnHost) -> dict[Link, int]:
    """Return this rank's addresses of the slots of those of its links for which it can have them. Collective."""
    slots: dict[Link, int] = {}
    told: dict[Link, Any] = {}
    for link in links:
        if link[1] == rank:
            with _cannot:
                slots[link], told[link] = memory.make(link)
    everyones = _gathered(told)
    for link in links:
        if link[0] == rank and link in everyones[link[1]]:
            with _cannot:
                slots[link] = memory.open(everyones[link[1]][link])
    _gathered(None)
    memory.all_have_opened()
    return slots


def _tried_out(ends: dict[Link, ChannelEnd], rank: int, device: torch.device) -> set[Link]:
    """Send a known tensor in three parts over all links, and return those for which it went well."""
    known = torch.arange((2 * SLOT + 4096) // 4, dtype=torch.int32, device=device)
    got = {link: torch.zeros_like(known) for link in ends if link[1] == rank}
    under_way: dict[Link, Copies] = {}
    for link, end in ends.items():
        with _cannot:
            under_way[link] = end.receive(got[link]) if link in got else end.send(known)
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and not all(copies.is_completed() for copies in under_way.values()):
        time.sleep(0.001)
    done = {link for link, copies in under_way.items() if copies.is_completed()}
    return {link for link in done if link not in got or torch.equal(got[link], known)}


def _both(here: Iterable[Link]) -> set[Link]:
    """Return the links that both of their ends have here. Collective."""
    everyones = _gathered(set(here))
    return {link for links in everyones for link in links if link in everyones[link[0]] and link in everyones[link[1]]}


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _disabled(variable: str) -> bool:
    return os.environ.get(variable, "0").strip() not in ("", "0")


@cache
def _slots_on_gpu(device: torch.device, gradients: bool) -> int:
    return cuda_driver.allocate(SLOTS * SLOT)


@cache
def _opened_on_gpu(handle: bytes) -> int:
    return cuda_driver.open_handle(handle)


@cache
def _stream(device: torch.device, sends: bool, gradients: bool, attempt: int) -> torch.cuda.Stream:
    return cuda_driver.new_stream(device)
