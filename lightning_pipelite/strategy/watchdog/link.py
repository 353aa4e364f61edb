"""One connection between rank 0 and another rank."""

from __future__ import annotations

import json
import os
import socket
import weakref
from contextlib import suppress
from functools import cache
from typing import Any

_LONGEST_LINE = 1 << 16  # bytes; a longer line does not come from a rank


class Link:
    """A TCP connection that carries JSON objects, one per line.

    The kernel closes the connections of a process that dies, so a death is detected without heartbeats; TCP keepalive
    covers a lost machine.

    Args:
        sock: The connected socket, owned by the link from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._buffer = b""
        self._socket = sock
        _OPEN.add(self)
        _close_in_forks()
        sock.settimeout(2.0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", 5),
            ("TCP_KEEPINTVL", 2),
            ("TCP_KEEPCNT", 5),
            ("TCP_USER_TIMEOUT", 15000),
        ):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        """Return the socket's file descriptor, for ``selectors``."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; do nothing if the connection is broken."""
        with suppress(OSError):  # a broken connection is noticed when it is read
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Read what has arrived.

        Raises:
            EOFError: If the connection has ended, or carries anything but such objects.
        """
        try:
            data = self._socket.recv(_LONGEST_LINE)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise EOFError from error
        if not data or len(self._buffer) > _LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


_OPEN: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork() -> None:
    """Close all connections in a forked data loader worker, which must not keep them open when its rank is killed."""
    for link in list(_OPEN):
        link.close()


@cache
def _close_in_forks() -> None:
    os.register_at_fork(after_in_child=_after_fork)
