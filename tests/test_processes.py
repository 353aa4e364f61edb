"""The pool of ranks that the tests share."""

from __future__ import annotations

import os
import time

import pytest

import processes
from processes import Workers


def seed_and_tell(seed: str) -> str | None:
    before = os.environ.get("PL_GLOBAL_SEED")
    os.environ["PL_GLOBAL_SEED"] = seed
    return before


def test_what_a_job_puts_into_the_environment_ends_with_it(workers: Workers) -> None:
    assert [workers.run(1, seed_and_tell, seed) for seed in ("3", "4")] == [[None], [None]]


class TooLongError(BaseException):
    """Not an Exception, like what pytest-timeout raises."""


def test_a_job_that_is_broken_off_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(*_: object) -> None:
        raise TooLongError

    pool = Workers(1)
    monkeypatch.setattr(processes.Workers, "_answer", broken_off)
    with pytest.raises(TooLongError):
        pool.run(1, time.sleep, 60)
    assert not pool._workers
