"""A launched rank must not outlive its launcher, as long as no watchdog would tell it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_PID = "PIPELITE_LAUNCHER_PID"
"""In the environment of a launched process: who launched it."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher(yes: bool) -> None:
    """Let the kernel send SIGKILL to this process when its launcher dies, or let it no longer do so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if yes else 0)


_launched = False


def guard_against_parent_death() -> None:
    """Tie a process that another rank has launched to that one, until its watchdog holds.

    Called as early as it can be told that this is such a process: where the command begins, and where a script makes
    the strategy. Once more does nothing.
    """
    global _launched
    launcher = os.environ.pop(LAUNCHER_PID, None)  # a process that this one starts is none of the launcher's
    if launcher is None:
        return
    die_with_launcher(True)
    if os.getppid() != int(launcher):  # it died before the line above
        os._exit(1)
    _launched = True


def was_launched() -> bool:
    """Whether this process was launched by another rank, which can tell its exit status."""
    return _launched
