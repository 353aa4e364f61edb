"""How processes end, and how their last output is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from lightning_pipelite.strategy.watchdog import timeouts
from lightning_pipelite.strategy.watchdog.failure import chain


def announce(message: str) -> None:
    """Write the last line of a job to stderr."""
    write_stderr(f"\npipelite: {message}\n")  # a progress bar leaves its line open


def leave(message: str | None = None) -> NoReturn:
    """End this process at once with status 1, whatever its other threads do; print ``message`` as its last line."""
    try:
        if message is not None:
            announce(message)
    finally:
        os._exit(1)


def after_traceback_of(exception: BaseException, action: Callable[[], None]) -> None:
    """Call ``action`` after Python, on exit, has printed the traceback of ``exception`` or of one that it led to."""
    print_traceback = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        print_traceback(kind, value, trace)
        if any(error is exception for error in chain(value)):  # not one that the user raised after catching it
            action()

    sys.excepthook = hook


def write_stderr(text: str) -> None:
    """Write to stderr after what is buffered, even if a stuck main thread holds the locks of Python's buffers."""

    def write() -> None:
        os.write(2, text.encode(errors="replace"))

    for action in (sys.stdout.flush, sys.stderr.flush, write):
        thread = threading.Thread(target=_try, args=(action,), daemon=True)
        thread.start()
        thread.join(timeouts.WRITE)


def _try(action: Callable[[], None]) -> None:
    with suppress(OSError, ValueError):  # no reader is left, or the stream is closed
        action()


def describe_exit(code: int | None) -> str:
    """Describe how a process ended, given its Popen's ``returncode``, or None if it is unknown."""
    if code is None:
        return "died without an error message (killed, or out of memory?)"
    if code >= 0:
        return f"died with exit code {code}"
    return f"died: killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"


def end_processes(processes: Iterable[subprocess.Popen[Any]], seconds: float) -> None:
    """Wait ``seconds`` for the processes to end on their own, then send SIGTERM, and 2 s later SIGKILL."""
    processes = list(processes)
    for signum, limit in ((None, seconds), (signal.SIGTERM, timeouts.SIGNAL), (signal.SIGKILL, timeouts.SIGNAL)):
        deadline = time.monotonic() + limit
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            if signum is not None:
                process.send_signal(signum)
        for process in alive:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
