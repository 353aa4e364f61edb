"""A second training never overwrites the results of the first, unless it resumes it or overwrite is set."""

from __future__ import annotations

from pathlib import Path

import pytest

from former_jobs import fit
from processes import Workers


@pytest.mark.parametrize("plain", [False, True], ids=["pipelite", "another strategy"])
@pytest.mark.parametrize("callback", ["trained", "timed"])
def test_a_second_training_is_refused_unless_it_is_told_to(
    workers: Workers, tmp_path: Path, callback: str, plain: bool
) -> None:
    again = {"callback": callback, "plain": plain, "max_epochs": 2}
    jobs = [{**again, "max_epochs": 1}, again, {**again, "fast_dev_run": True}, {**again, "overwrite": True}]
    ((first, second, tried, told),) = workers.run(1, fit, str(tmp_path), jobs)
    assert first["refused"] == ""
    assert ("SaveTrained: " if callback == "trained" else "TimedCheckpoint: ") in second["refused"]
    assert "overwrite" in second["refused"]
    assert second["steps"] == 0
    assert second["found"] == first["found"]
    assert second["trained"] == first["trained"]
    assert tried["refused"] == told["refused"] == ""
    assert told["steps"] == 8
    assert told["found"] != first["found"] or told["trained"] == "8"


def test_a_resumed_training_goes_on_where_it_was(workers: Workers, tmp_path: Path) -> None:
    jobs = [{"callback": "timed"}, {"callback": "timed", "ckpt_path": "last", "max_epochs": 3}]
    ((_, resumed),) = workers.run(1, fit, str(tmp_path), jobs)
    assert resumed["refused"] == ""
    assert resumed["steps"] == 12
    assert "checkpoints/step=00000012.ckpt" in resumed["found"]


def test_lightnings_checkpoints_are_numbered(workers: Workers, tmp_path: Path) -> None:
    ((_, second),) = workers.run(1, fit, str(tmp_path), [{"callback": "lightning's"}] * 2)
    assert second["refused"] == ""
    assert {"lightning/name.ckpt", "lightning/name-v1.ckpt"} < {*second["found"]}


def test_the_metrics_of_a_named_version_stay(workers: Workers, tmp_path: Path) -> None:
    ((first, second),) = workers.run(1, fit, str(tmp_path), [{"logger": "csv"}] * 2)
    assert first["refused"] == ""
    assert second["refused"].startswith("CSVLogger: ")
    assert second["found"] == first["found"]


def test_a_refused_or_empty_run_leaves_no_log_directory(workers: Workers, tmp_path: Path) -> None:
    """Neither a run that is refused after its loggers have started, nor one that has nothing left to do."""
    jobs = [
        {"logger": "board", "frozen": True},
        {"logger": "both", "max_steps": 0},
        {"logger": "both", "callback": "timed"},
        {"logger": "both", "callback": "timed", "ckpt_path": "last"},
        {"logger": "both", "callback": "timed", "ckpt_path": "last", "max_epochs": 2},
    ]
    ((refused, empty, first, complete, more),) = workers.run(1, fit, str(tmp_path), jobs)
    assert "nothing to train" in refused["refused"]
    assert refused["found"] == empty["found"] == []  # nor a parent directory created for it
    assert {"logs/board/version_0", "logs/csv/version_0"} < {*first["found"]}
    assert complete["refused"] == ""
    assert complete["found"] == first["found"]
    assert {"logs/board/version_1", "logs/csv/version_1", "logs/csv/version_0/metrics.csv"} < {*more["found"]}
