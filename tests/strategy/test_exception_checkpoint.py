"""A checkpoint saved because an error stops training is complete, and training resumes from it exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from exception_jobs import PLACES, failing, resume, saved_at_the_end, saved_in_a_step, with_lightnings
from processes import Workers
from resume_jobs import train

EXACT = [(hook, call) for hook, calls in PLACES.items() for call in calls]


@pytest.fixture(scope="module")
def undisturbed(workers: Workers) -> Any:
    return workers.run(1, train)[0]


@pytest.mark.parametrize(("hook", "call"), EXACT)
def test_to_the_bit_from_where_an_error_stopped_it(
    undisturbed: Any, workers: Workers, tmp_path: Path, hook: str, call: int
) -> None:
    assert workers.run(1, failing, str(tmp_path), hook, call) == [True]
    limit = {"max_steps": 15, "max_epochs": -1} if call % 2 else {}
    resumed = workers.run(1, partial(resume, **limit), str(tmp_path / f"{hook}-{call}.ckpt"))[0]
    assert resumed["lines"] == undisturbed["lines"][len(undisturbed["lines"]) - len(resumed["lines"]) :]
    assert len(resumed["lines"]) >= 15
    assert (resumed["step"], resumed["epoch"]) == (15, 3)
    torch.testing.assert_close(resumed["weights"], undisturbed["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["model", "model, last", "exception"])
def test_lightnings_own_callbacks(workers: Workers, tmp_path: Path, kind: str) -> None:
    """With one process they work as documented; with several they are refused before training."""
    found = workers.run(1, with_lightnings, str(tmp_path), kind, 1)[0]
    assert found == {
        "model": ["epoch=0-step=2.ckpt"],
        "model, last": ["epoch=0-step=2.ckpt", "last.ckpt"],
        "exception": ["on_exception.ckpt"],
    }[kind]  # fmt: skip
    for error in workers.run(2, with_lightnings, str(tmp_path), kind, 2, False):
        assert "can only be used with a single process" in error


def test_saved_by_hand_right_before_an_error(undisturbed: Any, workers: Workers, tmp_path: Path) -> None:
    """On one rank and on two: a checkpoint still being written in the background when they fail is completed."""
    for stages in (1, 2):
        folder = tmp_path / str(stages)
        workers.run(stages, saved_in_a_step, str(folder), stages)
        resumed = workers.run(1, resume, str(folder / "mine.ckpt"))[0]
        assert resumed["step"] == 15
        if stages == 1:
            assert resumed["lines"] == undisturbed["lines"][len(undisturbed["lines"]) - len(resumed["lines"]) :]


def test_saved_when_nobody_waits_any_more(workers: Workers, tmp_path: Path) -> None:
    """In the last hooks, after which the process may exit: the checkpoint is complete when the call returns."""
    for stages in (1, 2):
        for found in workers.run(stages, saved_at_the_end, str(tmp_path / str(stages)), stages):
            assert found == {"on_fit_end": True, "teardown": True}
    assert workers.run(1, resume, str(tmp_path / "2" / "teardown.ckpt"))[0]["step"] == 15
