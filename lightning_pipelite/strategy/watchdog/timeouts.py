"""How long the watchdog waits for what, in seconds; from a failure on, less than 30 s in all."""

from __future__ import annotations

TICK = 0.1
"""Between two looks at the children and at the own progress."""

ATTACH = 30.0
"""For the connections at the start."""

CAUSE = 5.0
"""For the cause of an error of communication to arrive."""

RELAY = 5.0
"""For rank 0 to confirm a failure, before a rank believes that rank 0 hangs and leaves alone."""

STATUS = 1.0
"""For the exit status of a dead rank to arrive from its parent."""

UNWIND = 10.0
"""For a main thread that raised to tear down and to print its traceback."""

GOODBYE = 1.0
"""For the other ranks to say that they are done, after those that raised had their time."""

CHILDREN = 5.0
"""For launched processes to leave by themselves, before they get SIGTERM."""

SIGNAL = 2.0
"""For a process to end after a signal, SIGTERM and then SIGKILL."""

WRITE = 1.0
"""For a stream to take what is written to it."""
