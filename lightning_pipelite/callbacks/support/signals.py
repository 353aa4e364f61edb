"""Signals that ask a training to save, noted until the end of the step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning_pipelite.shared.interrupt import heed_first_interrupt

SAVE, SAVE_AND_PASS_ON = 1, 2
STOPS = {3: signal.SIGTERM, 4: signal.SIGINT}
"""The requests to save and then stop, and the signals that make them."""
_MEANING = {signal.SIGUSR1: SAVE_AND_PASS_ON, **{signum: request for request, signum in STOPS.items()}}


class Signals:
    """Notes SIGUSR1, SIGTERM and SIGINT, no more: within a handler, no rank can tell what the others are doing.

    The second SIGINT ends the process at once.

    Lightning's own handlers do too much there. That of SIGTERM broadcasts, amid whatever collective is under way, and
    that of Slurm's requeueing saves a checkpoint. They are put aside; the latter is called when all have come to rest.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._former: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def listen(self) -> None:
        """Begin to take note; Python can do that in the main thread only."""
        if threading.current_thread() is threading.main_thread() and not self._former:
            self._former = {signum: signal.signal(signum, self._note) for signum in _MEANING}

    def ignore(self) -> None:
        """Put back the handlers that were there before, unless Lightning has put back what was there before its own."""
        former, self._former = self._former, {}
        for signum, handler in former.items():
            interrupted = signum == signal.SIGINT and signal.getsignal(signum) == signal.SIG_DFL
            if signal.getsignal(signum) == self._note or interrupted:
                signal.signal(signum, handler)

    def take(self) -> int:
        """Return what has been asked for since the last call: nothing (0), SAVE_AND_PASS_ON or one of STOPS."""
        noted, self._noted = self._noted, 0
        return noted

    def pass_on(self) -> None:
        """Call the handler that SIGUSR1 had before: under Slurm Lightning's, which requeues the job."""
        handler: Callable[[int, FrameType | None], Any] | Any = self._former.get(signal.SIGUSR1)
        if callable(handler):
            handler(signal.SIGUSR1, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of a data loader; its rank still needs it
        self._noted = max(self._noted, _MEANING[signal.Signals(signum)])
        if signum == signal.SIGINT:
            heed_first_interrupt()
