"""Signals that request a save, recorded until the end of the step."""

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
"""The requests to save and then stop, and the signals that trigger them."""
_MEANING = {signal.SIGUSR1: SAVE_AND_PASS_ON, **{signum: request for request, signum in STOPS.items()}}


class Signals:
    """Records SIGUSR1, SIGTERM and SIGINT and does nothing else: in a handler, no rank knows what the others are doing.

    A second SIGINT ends the process at once.

    Lightning's own handlers do too much: its SIGTERM handler broadcasts amid whatever collective is running, and its
    Slurm requeue handler saves a checkpoint. They are replaced; the latter is called once all ranks have saved.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._former: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def listen(self) -> None:
        """Start recording; Python allows this in the main thread only."""
        if threading.current_thread() is threading.main_thread() and not self._former:
            self._former = {signum: signal.signal(signum, self._note) for signum in _MEANING}

    def ignore(self) -> None:
        """Restore the previous handlers, unless Lightning has already restored those from before its own."""
        former, self._former = self._former, {}
        for signum, handler in former.items():
            interrupted = signum == signal.SIGINT and signal.getsignal(signum) == signal.SIG_DFL
            if signal.getsignal(signum) == self._note or interrupted:
                signal.signal(signum, handler)

    def take(self) -> int:
        """Return the request since the last call: none (0), SAVE_AND_PASS_ON or one of STOPS."""
        noted, self._noted = self._noted, 0
        return noted

    def pass_on(self) -> None:
        """Call the previous handler of SIGUSR1: under Slurm, Lightning's, which requeues the job."""
        handler: Callable[[int, FrameType | None], Any] | Any = self._former.get(signal.SIGUSR1)
        if callable(handler):
            handler(signal.SIGUSR1, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader worker, which its rank still needs
        self._noted = max(self._noted, _MEANING[signal.Signals(signum)])
        if signum == signal.SIGINT:
            heed_first_interrupt()
