"""Which ranks of a job hand each other tensors through mailboxes."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from lightning_pipelite.strategy import cuda_driver
from lightning_pipelite.strategy.mailboxes import SLOT, SLOTS, Copies, Mailbox, MailboxEnd
from lightning_pipelite.strategy.shared_memory import SharedMemory

Link = tuple[int, int, bool]
"""From which global rank to which, and whether gradients travel."""

_PAGE, _TOKEN = 4096, 16
"""How many bytes a receiver has for its counts; the last tell them from another host's memory of the same name."""

_SECONDS = 20.0
"""After which a mailbox that is tried out counts as out of order."""

_NOT_HERE = contextlib.suppress(OSError, RuntimeError)  # other hosts, GPUs that cannot, no room for shared memory


def connect(links: Iterable[Link], rank: int, device: torch.device) -> tuple[dict[Link, MailboxEnd], set[Link]]:
    """Set up a mailbox for each link whose ends are on one host, and try it out. Collective over all ranks.

    Args:
        links: Those that begin or end here; of those that end here, one of activations and one of gradients.
        rank: This process's global rank.
        device: Its GPU.

    Returns:
        This rank's ends, and the links of all ranks that have a mailbox, the same on every rank.
    """
    incoming = [link for link in links if link[1] == rank]
    outgoing = [link for link in links if link[0] == rank]
    offer: tuple[str, bytes, dict[Link, bytes]] | None = None
    with _NOT_HERE:
        counts = SharedMemory(_PAGE)
        counts.host[-_TOKEN:] = torch.frombuffer(bytearray(secrets.token_bytes(_TOKEN)), dtype=torch.uint8)
        handles = {}
        for link in incoming:
            with _NOT_HERE:
                handles[link] = cuda_driver.handle_of(_own_slots(device, link[2]))
        offer = counts.path, _token(counts), handles
    offers = _gathered(offer)
    boxes: dict[Link, Mailbox] = {}
    on_host: dict[Link, SharedMemory] = {}
    for link in outgoing:
        with _NOT_HERE:
            boxes[link] = _opened(offers[link[1]], link, on_host)
    names = _gathered({link: on_host[link].path if link in on_host else "" for link in boxes})
    for link in incoming:
        with _NOT_HERE:
            name = names[link[0]].get(link)
            if offer and name is not None:
                slots = SharedMemory(SLOTS * SLOT, name).address if name else _own_slots(device, link[2])
                boxes[link] = _mailbox(slots, counts, link)
    links_with_both = _both(boxes)
    for memory in (*on_host.values(), *([counts] if offer else [])):
        memory.forget_name()
    ends = {link: MailboxEnd(box, _stream(device, link[0] == rank, link[2])) for link, box in boxes.items()}
    working = _both(_try_out({link: ends[link] for link in links_with_both if link in ends}, rank, device))
    return {link: end for link, end in ends.items() if link in working}, working


def _opened(
    offer: tuple[str, bytes, dict[Link, bytes]] | None, link: Link, on_host: dict[Link, SharedMemory]
) -> Mailbox:
    """Return the sender's view of a mailbox."""
    if offer is None:
        raise RuntimeError("the receiver has none")
    path, token, handles = offer
    counts = SharedMemory(_PAGE, path)
    if _token(counts) != token:
        raise FileNotFoundError(path)  # another host's
    slots = None
    if link in handles:
        with _NOT_HERE:
            slots = _open_slots(handles[link])
    if slots is None:
        on_host[link] = SharedMemory(SLOTS * SLOT)
        slots = on_host[link].address
    return _mailbox(slots, counts, link)


def _mailbox(slots: int, counts: SharedMemory, link: Link) -> Mailbox:
    first = counts.address + 128 * link[2]  # apart, as the processes write to them at the same time
    return Mailbox(slots, first, first + 64)


def _token(counts: SharedMemory) -> bytes:
    return bytes(counts.host[-_TOKEN:].tolist())


def _try_out(ends: dict[Link, MailboxEnd], rank: int, device: torch.device) -> set[Link]:
    """Send a known tensor over all links, three parts each, and return those for which it went well."""
    size = (2 * SLOT + 4096) // 4
    known = torch.arange(size, dtype=torch.int32, device=device)
    got = {link: torch.zeros_like(known) for link in ends if link[1] == rank}
    under_way: dict[Link, Copies] = {}
    for link, end in ends.items():
        with _NOT_HERE:
            under_way[link] = end.receive(got[link]) if link in got else end.send(known)
    until = time.monotonic() + _SECONDS
    while not all(copies.is_completed() for copies in under_way.values()) and time.monotonic() < until:
        time.sleep(0.001)
    done = {link for link, copies in under_way.items() if copies.is_completed()}
    return {link for link in done if link not in got or torch.equal(got[link], known)}


def _both(here: Iterable[Link]) -> set[Link]:
    """Return the links that both ends have."""
    everyones = _gathered(set(here))
    return {link for links in everyones for link in links if link in everyones[link[0]] and link in everyones[link[1]]}


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# A process has these once, for all trainings that it runs one after the other: memory that another process has opened
# cannot be freed safely.


@cache
def _own_slots(device: torch.device, gradients: bool) -> int:
    return cuda_driver.allocate(SLOTS * SLOT)


@cache
def _open_slots(handle: bytes) -> int:
    return cuda_driver.open_handle(handle)


@cache
def _stream(device: torch.device, sends: bool, gradients: bool) -> torch.cuda.Stream:
    return cuda_driver.new_stream(device)
