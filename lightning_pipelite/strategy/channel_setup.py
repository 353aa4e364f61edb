"""Sets up the channels between the ranks of a job."""

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
"""Bytes of a receiver's page of counts, and of the token at its end.

The token tells the page from another host's memory of the same name.
"""

_IN_USE: list[SharedMemory] = []
"""Memory that is kept for the life of the process."""

_cannot = contextlib.suppress(OSError, RuntimeError)  # another host, memory out of the GPU's reach, too little memory


class Channels:
    """Channels between the ranks of a job that share a host, each tested before use.

    The slots are in host memory, not on the receiver's GPU: many consumer GPUs cannot access each other's memory, and
    on some boards peer-to-peer transfers arrive corrupted. It would not be faster either, as transfers are hidden: with
    the links between H200 GPUs awake everything else takes 2 % longer, because the GPU's clock is lowered to stay
    within its power limit (benchmarks/results/scaling_2_gpus_virtual.md). As with NCCL, ``NCCL_SHM_DISABLE=1`` disables
    memory shared between processes, and with it every channel. Construction is collective over all ranks.

    Args:
        links: All links of the job; at most one of activations and one of gradients end at a rank.
        rank: This process's global rank.
        device: Its GPU.

    Attributes:
        ends: This rank's end of each of its links that has a channel.
        connected: All links of the job that have a channel, the same on every rank.
    """

    def __init__(self, links: Collection[Link], rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._pages: dict[int, SharedMemory] = {}  # the counts of what each rank receives, by rank
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
        """Free the memory, unless a GPU still waits for what will never come: then the process is about to end."""
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
        gathered(None)  # a barrier: after it all ranks have opened what they can
        if own:
            own.forget_name()

    def _share_slots(self, links: Collection[Link]) -> None:
        """Create or open the slots of this rank's links, where that is possible. Collective."""
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
