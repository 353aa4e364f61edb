"""Signals that ask a training to save, noted until the end of the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SAVE, SAVE_AND_PASS_ON, SAVE_AND_STOP = 1, 2, 3
_MEANING = {signal.SIGUSR1: SAVE_AND_PASS_ON, signal.SIGTERM: SAVE_AND_STOP}


class Signals:
    """Notes SIGUSR1 and SIGTERM, and no more: within a handler, no rank can tell what the others are doing.

    Lightning's own handlers do too much there. That of SIGTERM broadcasts, amid whatever collective is under way, and
    that of Slurm's requeueing saves a checkpoint. They are put aside; the latter is called when all have come to rest.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._former: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Begin to take note; Python can do that in the main thread only."""
        if threading.current_thread() is threading.main_thread() and not self._former:
            self._former = {signum: signal.signal(signum, self._note) for signum in _MEANING}

    def ignore(self) -> None:
        """Put back the handlers that were there before, unless Lightning has put back what was there before its own."""
        former, self._former = self._former, {}
        for signum, handler in former.items():
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, handler)

    def take(self) -> int:
        """What has been asked for since the last call: nothing (0), SAVE_AND_PASS_ON or SAVE_AND_STOP."""
        noted, self._noted = self._noted, 0
        return noted

    def pass_on(self) -> None:
        """Call the handler that SIGUSR1 had before: under Slurm Lightning's, which requeues the job."""
        handler: Callable[[int, FrameType | None], Any] | Any = self._former.get(signal.SIGUSR1)
        if callable(handler):
            handler(signal.SIGUSR1, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._noted = max(self._noted, _MEANING[signal.Signals(signum)])
