"""Lightning's counts of micro-batches per replica, which change when the number of replicas does."""

from __future__ import annotations

from collections.abc import MutableMapping

COUNTS = ("ready", "started", "processed", "completed")


def recount(counts: MutableMapping[str, int], ready: int) -> None:
    """Set the number of micro-batches that have been taken, in place.

    The other counts stay as far behind it, by 0 or 1 each, which tells Lightning where in a micro-batch its loop is.

    Args:
        counts: The state, or the ``vars()``, of a progress tracker.
        ready: The number that have been taken.
    """
    shift = ready - counts["ready"]
    for name in COUNTS:
        counts[name] += shift
