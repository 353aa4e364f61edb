"""The watchdog's timeouts, in seconds; after a failure they add up to less than 30 s."""

from __future__ import annotations

TICK = 0.1
"""Between two checks of the children and of the rank's own progress."""

ATTACH = 30.0
"""For the ranks to connect at the start."""

CAUSE = 5.0
"""For the cause of a communication error to arrive."""

RELAY = 5.0
"""For rank 0 to confirm a failure, before a rank assumes that rank 0 hangs, and exits alone."""

STATUS = 1.0
"""For the exit status of a dead rank to arrive from its parent."""

UNWIND = 10.0
"""For a main thread that raised to tear down and print its traceback."""

GOODBYE = 1.0
"""For the other ranks to report that they are done, after those that raised have had their time."""

CHILDREN = 5.0
"""For launched processes to exit on their own, before they get SIGTERM."""

SIGNAL = 2.0
"""For a process to end after a signal, SIGTERM and then SIGKILL."""

WRITE = 1.0
"""For a stream to accept what is written to it."""
