"""The pool of ranks that the tests share."""

from __future__ import annotations

import time

import pytest

import processes
from processes import Workers


class TooLongError(BaseException):
    """Not an Exception, as what pytest-timeout raises."""


def test_a_job_that_is_broken_off_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(*_: object) -> None:
        raise TooLongError

    pool = Workers(1)
    monkeypatch.setattr(processes.Workers, "_answer", broken_off)
    with pytest.raises(TooLongError):
        pool.run(1, time.sleep, 60)
    assert not pool._workers
