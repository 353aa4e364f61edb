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
    """Lets the kernel send SIGKILL to this process when its launcher dies, or no longer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if yes else 0)


def _guard_against_parent_death() -> bool:
    """Called at import, in a launched process: until the watchdog holds, it must not outlive its launcher."""
    launcher = os.environ.pop(LAUNCHER_PID, None)  # a process that this one starts is none of the launcher's
    if launcher is None:
        return False
    die_with_launcher(True)
    if os.getppid() != int(launcher):  # it died before the line above
        os._exit(1)
    return True


LAUNCHED = _guard_against_parent_death()
"""Whether this process was launched by another rank, which can tell its exit status."""
