"""Ctrl-C in a training: the first one ends it in order, the second one at once."""

from __future__ import annotations

import os
import signal

from lightning.pytorch.utilities.rank_zero import rank_zero_only

_NOTICE = "\nCtrl-C: training ends after this step, or this evaluation; Ctrl-C again ends it at once.\n"


def heed_first_interrupt() -> None:
    """Say on rank 0 that SIGINT was noted, as its handler calls this, and leave the next one to the system."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        os.write(2, _NOTICE.encode())  # print() within a handler may meet itself


def name_of(signum: int) -> str:
    """Return what a user calls the signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
