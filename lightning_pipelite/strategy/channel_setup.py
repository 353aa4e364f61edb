"""Which ranks of a job have channels between them."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection

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

    The slots are in the host's memory, not on the receiver's GPU: many consumer GPUs don't reach each other's memory,
    and on some boards what goes from one to the other arrives broken. Nor would it be faster, as transfers are hidden:
    with an H200's links between GPUs awake the rest takes 2 % longer, as its clock is lowered to stay within its power
    (benchmarks/results/scaling_2_gpus_virtual.md). As with NCCL, ``NCCL_SHM_DISABLE=1`` leaves out memory that
    processes share, and so every channel. Building it is collective over all ranks.

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
        self._slots: dict[Link, SharedMemory] = {}
        self._made: dict[Link, ChannelEnd] = {}
        mine = {link for link in links if rank in link[:2]}
        self._share_pages({link[1] for link in mine if link[0] == rank})
        together = with_both_ends(link for link in mine if rank in self._pages and link[1] in self._pages)
        self._share_slots(mine & together)
        for link in with_both_ends(self._slots) & mine:
            with _cannot:
                self._made[link] = self._end(link)
        self.connected: set[Link] = try_out(self._made, rank, device)
        self.ends = {link: end for link, end in self._made.items() if link in self.connected}

    def close(self) -> None:
        """Give the memory back, unless a GPU still waits for what never comes: then the process is about to end."""
        memories = [*self._pages.values(), *self._slots.values()]
        if all(end.is_idle() for end in self._made.values()):
            for end in self._made.values():
                end.close()
            for memory in memories:
                memory.close()
        else:
            _IN_USE.extend(memories)

    def _share_pages(self, peers: Collection[int]) -> None:
        with _cannot:
            cuda_driver.get_ready(self._device)
            if os.environ.get("NCCL_SHM_DISABLE", "0").strip() in ("", "0"):
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

    def _share_slots(self, links: Collection[Link]) -> None:
        """Get the slots of those of this rank's links for which it can have them. Collective."""
        told: dict[Link, str] = {}
        for link in links:
            if link[1] == self._rank:
                with _cannot:
                    self._slots[link] = SharedMemory(SLOTS * SLOT)
                    told[link] = self._slots[link].path
        everyones = gathered(told)
        for link in links:
            if link[0] == self._rank and link in everyones[link[1]]:
                with _cannot:
                    self._slots[link] = SharedMemory(SLOTS * SLOT, everyones[link[1]][link])
        gathered(None)
        for link in told:
            self._slots[link].forget_name()

    def _end(self, link: Link) -> ChannelEnd:
        page, start = self._pages[link[1]], 256 * link[2]
        counts = page.host[start : start + 256].view(torch.int32)
        channel = Channel(self._slots[link].address, page.address + start, counts)
        return ChannelEnd(channel, cuda_driver.new_stream(self._device))


def _token(page: SharedMemory) -> bytes:
    return bytes(page.host[-_TOKEN:].tolist())
