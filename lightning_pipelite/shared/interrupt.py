"""Ctrl-C during training: the first one ends it cleanly, the second one at once."""

from __future__ import annotations

import os
import signal

from lightning.pytorch.utilities.rank_zero import rank_zero_only

_NOTICE = "\nCtrl-C: training ends after this step, or this evaluation; Ctrl-C again ends it at once.\n"


def heed_first_interrupt() -> None:
    """Report on rank 0 that SIGINT was noted, and leave the next one to the system; called by SIGINT's handler."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        os.write(2, _NOTICE.encode())  # print() is not reentrant: the handler may have interrupted one


def name_of(signum: int) -> str:
    """Return the name that users know a signal by."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
