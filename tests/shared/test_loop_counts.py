"""One function rewrites Lightning's counts, both in its states and in its trackers."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from lightning.pytorch.loops.progress import _ProcessedTracker

from lightning_pipelite.shared.loop_counts import recount


@pytest.mark.parametrize("ready", [0, 3, 12])
def test_where_the_loop_stands_stays(ready: int) -> None:
    tracker = _ProcessedTracker(ready=6, started=6, processed=6, completed=5)
    state = asdict(tracker)
    recount(state, ready)
    recount(vars(tracker), ready)
    expected = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
    assert asdict(tracker) == state == expected
