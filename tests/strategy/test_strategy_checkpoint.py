"""An interrupted training resumes from a checkpoint as if it had not stopped, with any number of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_jobs import train, validate
from processes import Workers


@pytest.fixture(scope="module", params=["optimi", "torch"])
def whole(request: pytest.FixtureRequest, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three epochs on one stage without interruption, and only the first of them on one and on two stages."""
    kind, made = request.param, tmp_path_factory.mktemp(request.param)
    reference = workers.run(1, train, str(made / "whole"), kind, 1, 3)[0]
    for stages in (1, 2):
        workers.run(stages, train, str(made / str(stages)), kind, stages, 1)
    return kind, made, reference


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_resuming_equals_not_stopping(whole: Any, workers: Workers, tmp_path: Path, before: int, after: int) -> None:
    kind, made, reference = whole
    path = str(made / str(before) / "last.ckpt")
    ranks = workers.run(after, train, str(tmp_path / "on"), kind, after, 3, path)
    for resumed in ranks:
        assert resumed["step"] == reference["step"] == 9
        assert resumed["losses"] == pytest.approx(reference["losses"][3:], abs=1e-6)
        assert resumed["norms"] == pytest.approx(reference["norms"][3:], rel=1e-5)
        assert resumed["rates"] == pytest.approx(reference["rates"])
        assert resumed["eval"] == pytest.approx(reference["eval"], abs=1e-6)
        assert resumed["last"] == pytest.approx(reference["last"], abs=1e-6)
        assert resumed["best score"] == pytest.approx(reference["best score"], abs=1e-6)
        assert resumed["best"] == pytest.approx(resumed["best score"], abs=1e-6)
    torch.testing.assert_close(dict(sorted(ranks[0]["weights"].items())), reference["weights"], atol=1e-6, rtol=0)


def test_only_the_best_and_the_last_are_kept(whole: Any) -> None:
    _, _, reference = whole
    assert len(reference["files"]) == 3
    assert "last.ckpt" in reference["files"]
    assert not [name for name in reference["files"] if name.startswith(".")]


def test_a_trainer_that_has_not_trained_validates_a_checkpoint(whole: Any, workers: Workers) -> None:
    kind, made, _ = whole
    if kind == "torch":
        one = workers.run(1, validate, str(made / "whole" / "last.ckpt"), 1)[0]
        two = workers.run(2, validate, str(made / "whole" / "last.ckpt"), 2)[0]
        assert one == pytest.approx(whole[2]["last"], abs=1e-6)
        assert two == pytest.approx(one, abs=1e-6)
