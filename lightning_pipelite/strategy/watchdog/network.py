"""How the ranks find each other."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from typing import Any

import torch.distributed

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.watchdog import parent_death, timeouts
from lightning_pipelite.strategy.watchdog.client import Client
from lightning_pipelite.strategy.watchdog.coordinator import Coordinator
from lightning_pipelite.strategy.watchdog.link import Link

ADVICE = (
    "allow TCP connections between the nodes, or set MASTER_ADDR to an address of rank 0 that all of them can reach."
)


def join(rank: int, world_size: int, stage: int, host: str) -> Coordinator | Client:
    """Connect every other rank to rank 0: a collective over the default process group, with any backend.

    Args:
        rank: The global rank of this process.
        world_size: The number of ranks.
        stage: The pipeline stage of this rank.
        host: The name or address at which all ranks reach rank 0.

    Returns:
        On rank 0 its coordinator, which admits the others as it turns; on another rank its client.

    Raises:
        ConfigurationError: If a rank cannot reach rank 0.
    """
    if world_size == 1:
        return Coordinator()
    shared: list[Any] = [0, "", 0]
    if rank == 0:
        listener = _listen(host, world_size)
        shared = [listener.getsockname()[1], secrets.token_hex(16), stage]
    torch.distributed.broadcast_object_list(shared, src=0)
    port, token, coordinator_stage = shared
    if rank == 0:
        return Coordinator(world_size, listener, token)
    link = _dial(host, port, rank)
    link.send(token=token, rank=rank, stage=stage, launched=parent_death.was_launched())
    return Client(link, coordinator_stage)


def _listen(host: str, backlog: int) -> socket.socket:
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    # On all interfaces: rank 0 may resolve its own name to a loopback address (Debian's 127.0.1.1), useless to others.
    with suppress(OSError, ValueError):
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _dial(host: str, port: int, rank: int) -> Link:
    try:
        return Link(socket.create_connection((host, port), timeout=timeouts.ATTACH))
    except OSError as error:
        raise ConfigurationError(f"rank {rank} cannot reach rank 0 at {host}:{port} ({error}); {ADVICE}") from error
