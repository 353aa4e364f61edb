"""Which ranks of a job have channels between them, and in whose memory."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection
from functools import cache
from typing import Any

import torch

from lightning_pipelite.shared.over_ranks import gathered
from lightning_pipelite.strategy import cuda_driver
from lightning_pipelite.strategy.channel_trial import try_out
from lightning_pipelite.strategy.copy_channels import SLOT, SLOTS, Channel, ChannelEnd
from lightning_pipelite.strategy.links import Link, with_both_ends
from lightning_pipelite.strategy.shared_memory import SharedMemory

_PAGE, _TOKEN = 4096, 16
"""How many bytes a receiver has for its counts; the last tell them from another host's memory of the same name."""

_IN_USE: list[SharedMemory] = []
"""For the life of the process."""

_cannot = contextlib.suppress(OSError, RuntimeError)  # another host, GPUs out of each other's reach, too little memory


class Channels:
    """Channels between the ranks of a job that share a host, each of which has been tried out.

    The slots are on the receiver's GPU, or else in the host's memory: many consumer GPUs don't reach each other's
    memory, and on some boards what goes from one to the other arrives broken. As with NCCL, ``NCCL_P2P_DISABLE=1``
    leaves out the former, and ``NCCL_SHM_DISABLE=1`` all memory that processes share, and so every channel. Building
    it is collective over all ranks.

    Args:
        links: Of the whole job; at most one of activations and one of gradients end at a rank.
        rank: This process's global rank.
        device: Its GPU.

    Attributes:
        ends: Of the links that begin or end at this rank and have a channel.
        connected: The links of all ranks that have one, the same on every rank.
    """

    def __init__(self, links: Collection[Link], rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._pages: dict[int, SharedMemory] = {}  # with the counts of what a rank receives
        self._on_host: dict[Link, SharedMemory] = {}  # slots
        self._made: list[ChannelEnd] = []
        self.ends: dict[Link, ChannelEnd] = {}
        self.connected: set[Link] = set()
        with _cannot:
            cuda_driver.get_ready(device)
        mine = {link for link in links if rank in link[:2]}
        self._share_pages({link[1] for link in mine if link[0] == rank})
        together = with_both_ends(link for link in mine if rank in self._pages and link[1] in self._pages)
        for on_gpu in (True, False):
            wanted = set() if on_gpu and _disabled("NCCL_P2P_DISABLE") else mine & together - self.connected
            slots = self._share_slots(wanted, on_gpu)
            ends = {}
            for link in with_both_ends(slots) & mine:
                with _cannot:
                    ends[link] = self._end(link, slots[link], on_gpu)
            self._made += ends.values()
            working = try_out(ends, rank, device)
            self.connected |= working
            self.ends |= {link: end for link, end in ends.items() if link in working}

    def close(self) -> None:
        """Give the memory back, unless a GPU still waits for what never comes: then the process is about to end."""
        memories = [*self._pages.values(), *self._on_host.values()]
        if all(end.is_idle() for end in self._made):
            for end in self._made:
                end.close()
            for memory in memories:
                memory.close()
        else:
            _IN_USE.extend(memories)

    def _share_pages(self, peers: Collection[int]) -> None:
        with _cannot:
            if not _disabled("NCCL_SHM_DISABLE"):
                page = SharedMemory(_PAGE)
                page.host[-_TOKEN:] = torch.frombuffer(bytearray(secrets.token_bytes(_TOKEN)), dtype=torch.uint8)
                self._pages[self._rank] = page
        own = self._pages.get(self._rank)
        told = gathered(None if own is None else (own.path, _token(own)))
        for peer in peers:
            if own and (theirs := told[peer]):
                with _cannot:
                    path, token = theirs
                    page = SharedMemory(_PAGE, path)
                    if _token(page) == token:
                        self._pages[peer] = page
                    else:
                        page.close()
        gathered(None)  # by when all have opened what they can
        if own:
            own.forget_name()

    def _share_slots(self, links: Collection[Link], on_gpu: bool) -> dict[Link, int]:
        """Return this rank's addresses of the slots of those of its links for which it can have them. Collective."""
        slots: dict[Link, int] = {}
        told: dict[Link, Any] = {}  # a handle, or a path
        for link in links:
            if link[1] == self._rank:
                with _cannot:
                    if on_gpu:
                        slots[link] = _slots_on_gpu(self._device, link[2])
                        told[link] = cuda_driver.handle_of(slots[link])
                    else:
                        self._on_host[link] = SharedMemory(SLOTS * SLOT)
                        slots[link], told[link] = self._on_host[link].address, self._on_host[link].path
        everyones = gathered(told)
        for link in links:
            if link[0] == self._rank and link in everyones[link[1]]:
                with _cannot:
                    if on_gpu:
                        slots[link] = _opened_on_gpu(everyones[link[1]][link])
                    else:
                        self._on_host[link] = SharedMemory(SLOTS * SLOT, everyones[link[1]][link])
                        slots[link] = self._on_host[link].address
        gathered(None)
        for link, memory in self._on_host.items():
            if link[1] == self._rank:
                memory.forget_name()
        return slots

    def _end(self, link: Link, slots: int, on_gpu: bool) -> ChannelEnd:
        page, start = self._pages[link[1]], 1024 * on_gpu + 256 * link[2]
        channel = Channel(slots, page.address + start, page.host[start : start + 256].view(torch.int32))
        return ChannelEnd(channel, cuda_driver.new_stream(self._device))


def _token(page: SharedMemory) -> bytes:
    return bytes(page.host[-_TOKEN:].tolist())


def _disabled(variable: str) -> bool:
    return os.environ.get(variable, "0").strip() not in ("", "0")


# Memory that another process has opened cannot be freed safely; so a process has these once.


@cache
def _slots_on_gpu(device: torch.device, gradients: bool) -> int:
    return cuda_driver.allocate(SLOTS * SLOT)


@cache
def _opened_on_gpu(handle: bytes) -> int:
    return cuda_driver.open_handle(handle)
