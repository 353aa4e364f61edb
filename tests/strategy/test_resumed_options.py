"""A resumed training follows the options given now, not those of the checkpoint, and reports the differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_pipelite.strategy.resumed_options import keep_callback_options
from option_jobs import in_plain_torch, resumed
from processes import Workers

FORMER = ({}, "warm-up", {})
CASES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "nothing": (FORMER, FORMER, ""),
    "rate": (({}, "none", {}), ({"lr": 0.1}, "none", {}), "lr of parameter group 0 is 0.1 (0.02 in the checkpoint)"),
    "decay, betas": (
        ({}, "none", {}),
        ({"weight_decay": 0.0, "betas": (0.5, 0.6)}, "none", {}),
        "betas of parameter group 0 is (0.5, 0.6) ((0.9, 0.999) in the checkpoint); weight_decay of parameter group 0",
    ),
    "rate with a schedule": (FORMER, ({"lr": 0.1}, "warm-up", {}), "lr of parameter group 1 is 0.1 (0.02"),
    "warm-up": (FORMER, ({}, "warm-up", {"steps": 4}), "the schedule's current learning rate is 0.02 (0.01"),
    "object": (({}, "object", {}), ({}, "object", {"steps": 4}), "the schedule's current learning rate is 0.02 (0.01"),
    "object, unchanged": (({}, "object", {}), ({}, "object", {}), ""),
    "gamma": (({}, "steps", {}), ({}, "steps", {"gamma": 0.9}), "StepLR's gamma is 0.9 (0.5 in the checkpoint)"),
    "rate of steps": (({}, "steps", {}), ({"lr": 0.1}, "steps", {}), "lr of parameter group 0 is 0.1 (0.02"),
    "length": (({}, "cosine", {}), ({}, "cosine", {"total": 20}), "CosineAnnealingLR's T_max is 20 (9 in the"),
    "cycle": (({}, "cycle", {}), ({}, "cycle", {"max_lr": 0.2}), "max_lr of parameter group 0 is 0.2 (0.05 in the"),
    "cycle, unchanged": (({}, "cycle", {}), ({}, "cycle", {}), ""),
    "within another": (({}, "two", {}), ({}, "two", {"steps": 2}), ""),
    "within another, seen": (({}, "two", {}), ({"lr": 0.1}, "two", {"steps": 3}), "lr of parameter group 0 is 0.1"),
    "another schedule": (({}, "steps", {}), ({}, "cosine", {}), "the schedule is CosineAnnealingLR (StepLR in the"),
    "a schedule more": (({}, "none", {}), ({}, "cosine", {}), "1 learning-rate schedules (0 in the checkpoint)"),
    "no schedule more": (FORMER, ({"lr": 0.1}, "none", {}), "0 learning-rate schedules (1 in the checkpoint)"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_given_now_holds(workers: Workers, tmp_path: Path, name: str) -> None:
    """Compared with plain torch, where the new options start from scratch and only weights and moments are kept."""
    before, after, sentence = CASES[name]
    stages = 2 if name in ("rate", "rate with a schedule", "cycle") else 1
    run = workers.run(stages, resumed, str(tmp_path), stages, before, after)[0]
    assert sentence in run["told"]
    assert ("options that differ from the checkpoint's" in run["told"]) == bool(sentence)
    for weight, expected in zip(run["weights"].items(), in_plain_torch(before, after).items(), strict=True):
        assert weight[0] == expected[0]
        torch.testing.assert_close(weight[1], expected[1], atol=1e-6, rtol=0)


def test_the_patience_that_is_given_now_holds() -> None:
    former, now = EarlyStopping("eval/loss", patience=3), EarlyStopping("eval/loss", patience=7)
    former.wait_count = 2
    states = {former.state_key: former.state_dict()}
    assert keep_callback_options([now], states) == ["EarlyStopping's patience is 7 (3 in the checkpoint)"]
    now.load_state_dict(states[now.state_key])
    assert (now.patience, now.wait_count) == (7, 2)
    assert keep_callback_options([now], states) == []
