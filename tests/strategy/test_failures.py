"""A real job that fails ends as a whole: benchmarks/failures.py has all ways and launchers."""

from __future__ import annotations

import pytest

from failing_job import Failure, failures, run

pytestmark = pytest.mark.process

CHOSEN = [
    ("lightning", failure, pieces)
    for pieces, chosen in ((1, {("kill", 0), ("nan", 0)}), (2, {("raise", 1)}))
    for failure in failures(3, pieces)
    if (failure.how, failure.rank) in chosen
] + [("nodes", failure, 1) for failure in failures(2) if failure.how == "hang"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "failure", "pieces"), CHOSEN, ids=lambda value: str(getattr(value, "how", value)))
def test_a_failing_rank_ends_the_job(launcher: str, failure: Failure, pieces: int) -> None:
    outcome = run(failure, launcher, ranks=2 if launcher == "nodes" else 3, virtual_stages=pieces)
    assert outcome.named, outcome
    assert outcome.code != 0
    assert outcome.left == 0
    assert outcome.seconds < 30
