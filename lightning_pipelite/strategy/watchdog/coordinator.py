"""Rank 0's end of the network."""

from __future__ import annotations

import hmac
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import connection
from typing import Any

from lightning_pipelite.strategy.watchdog import timeouts
from lightning_pipelite.strategy.watchdog.failure import Failure
from lightning_pipelite.strategy.watchdog.link import Link
from lightning_pipelite.strategy.watchdog.processes import describe_exit


class _Peer(Link):
    """The connection to another rank, and what that rank has reported of itself."""

    rank = stage = -1  # until its hello message
    launched = False  # whether a parent can report its exit status
    left = False  # whether it has said bye
    done = False  # whether it has nothing more to print


class Coordinator:
    """Admits the ranks, detects their deaths, and tells all ranks of the first failure.

    Used by one thread only, except for ``complete`` and ``missing``.

    Args:
        world_size: The number of ranks.
        listener: The socket that other ranks connect to; None in a job of one rank.
        token: What a rank must present to be admitted.

    Attributes:
        failure: What ended the job, once something has.
        complete: Set when every rank is connected.
        lost: Whether rank 0 has died or does not answer; never true here.
    """

    lost = False

    def __init__(self, world_size: int = 1, listener: socket.socket | None = None, token: str = "") -> None:
        self.failure: Failure | None = None
        self.complete = threading.Event()
        self._world_size = world_size
        self._listener = listener
        self._token = token
        self._peers: list[_Peer] = []  # open, admitted or not
        self._ranks: dict[int, _Peer] = {}  # admitted, open or not
        self._deaths: dict[int, float] = {}  # rank: when detected, in order
        self._exits: dict[int, int] = {}  # rank: exit status, from its parent
        if listener is None:
            self.complete.set()
        else:
            listener.setblocking(False)  # a peer may be gone before it is accepted

    @property
    def alone(self) -> bool:
        """Whether no connected rank has anything left to print."""
        return all(peer.done for peer in self._peers)

    @property
    def missing(self) -> list[int]:
        """The ranks that never connected."""
        return [rank for rank in range(1, self._world_size) if rank not in self._ranks]

    def turn(self, seconds: float) -> None:
        """Wait up to ``seconds`` for something to happen, and handle it."""
        sources: list[Any] = [*self._peers, self._listener] if self._listener else [*self._peers]
        for source in connection.wait(sources, seconds):
            if isinstance(source, _Peer):
                self._read(source)
            elif self._listener is not None:
                with suppress(OSError):
                    self._peers.append(_Peer(self._listener.accept()[0]))
        for rank, since in self._deaths.items():
            peer, code = self._ranks[rank], self._exits.get(rank)
            if code is None and peer.launched and time.monotonic() - since < timeouts.STATUS:
                break  # a later death may be a consequence of this one
            self.report(Failure(rank, peer.stage, describe_exit(code), "died"))

    def report(self, failure: Failure) -> None:
        """Tell all ranks of ``failure``, if it is the first."""
        if self.failure is None:
            self.failure = failure
            self.say(failure=asdict(failure))

    def report_exit(self, rank: int, code: int) -> None:
        """Note the exit status of a rank; one that failed is dead, even if a fork holds its connection."""
        self._exits[rank] = code
        if code != 0 and rank in self._ranks and not self._ranks[rank].left:
            self._deaths.setdefault(rank, time.monotonic())

    def say(self, **message: Any) -> None:
        """Send ``message`` to all."""
        for peer in self._peers:
            peer.send(**message)

    def close(self) -> None:
        """Close all connections, upon which the other ranks exit."""
        for peer in self._peers:
            peer.close()
        self._peers = []
        self._stop_listening()

    def _read(self, peer: _Peer) -> None:
        try:
            for message in peer.receive():
                self._handle(peer, message)
        except EOFError:
            peer.close()
            if peer in self._peers:
                self._peers.remove(peer)
            if peer.rank > 0 and not peer.left:
                self._deaths.setdefault(peer.rank, time.monotonic())

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.rank < 0:
            self._admit(peer, message)
        elif "failure" in message:
            self.report(Failure(**message["failure"]))
        elif "exit" in message:
            self.report_exit(*message["exit"])
        else:
            peer.left |= "bye" in message
            peer.done |= "done" in message

    def _admit(self, peer: _Peer, hello: dict[str, Any]) -> None:
        if not hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode()):
            raise EOFError
        peer.rank, peer.stage, peer.launched = hello["rank"], hello["stage"], hello["launched"]
        self._ranks[peer.rank] = peer
        if self.failure is not None:
            peer.send(failure=asdict(self.failure))
        if not self.missing:
            self._stop_listening()
            for stranger in [other for other in self._peers if other.rank < 0]:
                stranger.close()
                self._peers.remove(stranger)
            self.complete.set()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
