from __future__ import annotations

import pytest
import torch

from lightning_pipelite.models.flops import TrainingFlops
from lightning_pipelite.module.throughput import Speed
from lightning_pipelite.shared import step_clock


def test_tokens_and_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: now[0])
    measured = Speed(replicas=2, flops=TrainingFlops(per_token=10.0, per_pair=3.0), peak=1000.0)
    for tail in (0, 1, 1):  # seconds that the previous step takes after its loss
        now[0] += tail
        measured.pause()
        measured.pause()  # the end of an epoch, after its evaluation
        now[0] += 1000  # not counted
        measured.begin(torch.tensor([[0, 1, 2, 0, 1]]))
        now[0] += 2 - tail
        measured.pause()
        now[0] += 1000  # an evaluation between two micro-batches of a step does not count either
        measured.begin(torch.tensor([[0, 1, 2, 3, 4]]))
        now[0] += 3
        speeds = measured.end()
        pairs = 3 * 3 + 2 * 2 + 5 * 5
        assert speeds == {"train/tokens_per_s": 2 * 10 / 5, "train/mfu": 2 * (10 * 10.0 + pairs * 3.0) / 5 / 1000}


@pytest.mark.parametrize(("flops", "peak"), [(None, 1.0), (TrainingFlops(1.0, 1.0), None)])
def test_what_is_not_known_is_left_out(flops: TrainingFlops | None, peak: float | None) -> None:
    measured = Speed(1, flops, peak)
    measured.begin(torch.zeros(1, 4, dtype=torch.int64))
    assert measured.end().keys() == {"train/tokens_per_s"}
