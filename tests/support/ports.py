"""Ports for the rendezvous of test jobs."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """Return a free port outside of the range for outgoing connections.

    A port that the system chooses (``bind`` to 0) may be given to a connection before the job listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
