"""Keeps a launched rank from outliving its launcher until it has a watchdog."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_PID = "PIPELITE_LAUNCHER_PID"
"""The environment variable in which a launched process finds the process ID of its launcher."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher(yes: bool) -> None:
    """Make the kernel send SIGKILL to this process when its launcher dies, or stop it from doing so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if yes else 0)


_launched = False


def guard_against_parent_death() -> None:
    """Tie a process that another rank has launched to that rank, until its watchdog is connected.

    Called as early as possible in such a process: at the start of the command, and when a script creates the strategy.
    Further calls do nothing.
    """
    global _launched
    launcher = os.environ.pop(LAUNCHER_PID, None)  # not for the processes that this one starts
    if launcher is None:
        return
    die_with_launcher(True)
    if os.getppid() != int(launcher):  # the launcher died before the line above
        os._exit(1)
    _launched = True


def was_launched() -> bool:
    """Return whether this process was launched by another rank, which can report its exit status."""
    return _launched
