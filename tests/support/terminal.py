"""A terminal to print to, like a user's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Iterator


class Terminal:
    """What was written, available once the context has ended."""

    def __init__(self) -> None:
        self.written = b""

    @property
    def text(self) -> str:
        return self.written.decode()


@contextlib.contextmanager
def terminal(kind: str, columns: int = 120) -> Iterator[Terminal]:
    """Make standard error and standard output a terminal.

    Args:
        kind: Value of TERM.
        columns: Width of the terminal.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen = Terminal()

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                seen.written += data

    reader = threading.Thread(target=read)
    reader.start()
    before, streams = dict(os.environ), (sys.stdout, sys.stderr)
    os.environ.update(TERM=kind, COLUMNS=str(columns))  # rich would query the process's original streams
    with os.fdopen(theirs, "w") as file:
        sys.stdout = sys.stderr = file
        try:
            yield seen
        finally:
            sys.stdout, sys.stderr = streams
            os.environ.clear()
            os.environ.update(before)
    reader.join()
    os.close(ours)
