"""When one rank of a real job fails, the whole job ends; benchmarks/failures.py has all failures and launchers."""

from __future__ import annotations

import pytest

from failing_job import Failure, failures, run

pytestmark = pytest.mark.process

# In one case a middle stage fails. There are only a few, as each rank takes five seconds of CPU to start.
CHOSEN = [
    (launcher, ranks, failure, pieces)
    for launcher, ranks, pieces, chosen in (
        ("lightning", 3, 2, {("raise", 1)}),
        ("lightning", 2, 1, {("kill", 0), ("nan", 0)}),
        ("nodes", 2, 1, {("hang", 1)}),
    )
    for failure in failures(ranks, pieces)
    if (failure.how, failure.rank) in chosen
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks", "failure", "pieces"), CHOSEN, ids=lambda value: str(getattr(value, "how", value))
)
def test_a_failing_rank_ends_the_job(launcher: str, ranks: int, failure: Failure, pieces: int) -> None:
    outcome = run(failure, launcher, ranks, virtual_stages=pieces)
    assert outcome.named, outcome
    assert outcome.code != 0
    assert outcome.left == 0
    assert outcome.seconds < 30
