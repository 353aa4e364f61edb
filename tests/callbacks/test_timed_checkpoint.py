"""TimedCheckpoint: when it saves, and what it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_pipelite.callbacks import TimedCheckpoint
from lightning_pipelite.errors import ConfigurationError
from processes import Workers
from resume_jobs import train
from timed_jobs import asked, by_the_clock, failing_to_save, on_a_full_disk


def steps(*numbers: int) -> list[str]:
    return [f"step={number:08d}.ckpt" for number in numbers]


@pytest.mark.parametrize("way", ["SIGUSR1", "trigger"])
def test_on_request_it_saves_and_training_goes_on(workers: Workers, tmp_path: Path, way: str) -> None:
    """Besides the requested step 4, it saves at the end of the epoch, step 5, and of the training, step 8."""
    for rank in workers.run(2, asked, str(tmp_path / "a"), way):
        assert rank["status"] == 0
        assert rank["saved"] == steps(4, 5, 8)
        assert rank["requeued"] == (way == "SIGUSR1")


@pytest.mark.parametrize(("way", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_one_rank_saves_and_ends_all(workers: Workers, tmp_path: Path, way: str, status: int) -> None:
    reference = workers.run(2, train, 2)[0]
    for rank in workers.run(2, asked, str(tmp_path / "a"), way):
        assert rank["status"] == status
        assert rank["saved"] == steps(4)
    resumed = workers.run(2, train, 2, 1, 2, str(tmp_path / "a" / steps(4)[0]))[0]
    assert resumed["lines"] == reference["lines"][-len(resumed["lines"]) :]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_rank_0_decides_and_the_newest_are_kept(workers: Workers, tmp_path: Path, keep: int) -> None:
    everything = steps(1, 2, 3, 4, 5, 6, 7, 8)
    for rank in workers.run(2, by_the_clock, str(tmp_path), keep, None):
        assert rank["saved"] == everything[-keep:]


def test_the_best_is_kept_beside_the_newest(workers: Workers, tmp_path: Path) -> None:
    evaluated = {step: value for step, key, value in workers.run(2, train, 2)[0]["lines"] if key == "eval/loss"}
    # The evaluations run after steps 2, 4 and 7, but are logged with a step number lower by one.
    best = min((step for step in evaluated if step < 8), key=lambda step: evaluated[step]) + 1
    for rank in workers.run(2, by_the_clock, str(tmp_path), 1, "eval/loss"):
        assert rank["best"] == steps(best)[0]
        assert rank["saved"] == sorted({*steps(best), *steps(8)})
        assert float(rank["score"]) == pytest.approx(evaluated[best - 1], abs=1e-6)


def test_the_only_one_stays_while_nothing_can_be_written(workers: Workers, tmp_path: Path) -> None:
    for rank in workers.run(2, on_a_full_disk, str(tmp_path / "a")):
        assert rank["step"] == 9
        assert rank["saved"] == steps(9)
        assert all(steps(3)[0] in seen for seen in rank["seen"])


def test_the_checkpoint_stands_though_what_was_trained_cannot_be_written(workers: Workers, tmp_path: Path) -> None:
    """The job ends with that error; when resumed, it reports that training is already complete."""
    run = workers.run(1, failing_to_save, str(tmp_path / "a"))[0]
    assert run["saved"] == steps(5)
    assert "no such layer" in run["error"]
    assert f"resuming from {tmp_path}/a/{steps(5)[0]} (step 5)" in run["told"]
    assert "training is already complete" in run["told"]


def test_wrong_values_are_told() -> None:
    for options, sentence in (
        ({"checkpoint_interval_hours": 0}, "checkpoint_interval_hours must be positive, not 0"),
        ({"max_checkpoints": -1}, "max_checkpoints must be at least 0, not -1"),
        ({"mode": "least"}, "mode must be min or max"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            TimedCheckpoint(**options)  # type: ignore[arg-type]
