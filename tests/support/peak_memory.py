"""The current and the peak memory of this process. Linux only."""

from __future__ import annotations

import threading
import time
from pathlib import Path


def memory(field: str) -> int:
    """Return a field of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class PeakWatcher:
    """A context manager that samples ``RssAnon`` of this process from a thread.

    Args:
        interval: Seconds between two samples.

    Attributes:
        peak: The largest value seen, in bytes.
    """

    def __init__(self, interval: float) -> None:
        self.peak = 0
        self._interval, self._done = interval, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, memory("RssAnon"))
            time.sleep(self._interval)

    def __enter__(self) -> PeakWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
