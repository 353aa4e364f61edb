"""Lightning's counts of micro-batches, of which a replica has more or fewer when there are others than before."""

from __future__ import annotations

from collections.abc import MutableMapping

COUNTS = ("ready", "started", "processed", "completed")


def recount(counts: MutableMapping[str, int], ready: int) -> None:
    """Set how many micro-batches have been taken, in place.

    The other counts stay as far behind, 0 or 1 each: by that Lightning knows where in a micro-batch its loop stands.

    Args:
        counts: Of a progress tracker: its state, or its ``vars()``.
        ready: How many have been taken.
    """
    shift = ready - counts["ready"]
    for name in COUNTS:
        counts[name] += shift
