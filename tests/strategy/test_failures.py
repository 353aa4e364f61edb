"""A real job that fails ends as a whole: benchmarks/failures.py has all ways and launchers."""

from __future__ import annotations

import pytest

from failing_job import Failure, failures, run

pytestmark = pytest.mark.process

CHOSEN = [
    ("lightning", failure)
    for failure in failures(3)
    if (failure.how, failure.rank) in {("raise", 1), ("kill", 0), ("nan", 0)}
] + [("nodes", failure) for failure in failures(2) if failure.how == "hang"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "failure"), CHOSEN, ids=lambda value: getattr(value, "how", value))
def test_a_failing_rank_ends_the_job(launcher: str, failure: Failure) -> None:
    outcome = run(failure, launcher, ranks=2 if launcher == "nodes" else 3)
    assert outcome.named, outcome
    assert outcome.code != 0
    assert outcome.left == 0
    assert outcome.seconds < 30
