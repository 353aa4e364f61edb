"""Checkpoints: an interrupted training goes on as if it had not been, with whatever number of stages."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import train, validate
from torch import nn

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy import checkpoint
from processes import Workers


@pytest.fixture(scope="module", params=["optimi", "torch"])
def whole(request: pytest.FixtureRequest, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three epochs on one stage without an interruption, and the first of them on one and on two stages."""
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


def save(path: Path, stage: nn.Module, optimizer: Any = None, state: Any = None) -> None:
    checkpoint.save(path, state or {}, stage, optimizer, stage_id=0, writes=True, barrier=lambda: None)


def test_what_is_not_a_checkpoint_or_of_another_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"it has no trainer\.pt"):
        checkpoint.load_trainer_state(tmp_path)
    save(tmp_path / "a.ckpt", nn.Linear(3, 2))
    with pytest.raises(ConfigurationError, match=r"does not hold the parameter 0\.weight"):
        checkpoint.load_parameters(tmp_path / "a.ckpt", nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ConfigurationError, match=r"holds weight with shape \[2, 3\], not \[2, 4\]"):
        checkpoint.load_parameters(tmp_path / "a.ckpt", nn.Linear(4, 2))
    save(tmp_path / "b.ckpt", nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ConfigurationError, match="does not hold the buffer running_mean"):
        checkpoint.load_parameters(tmp_path / "b.ckpt", nn.BatchNorm1d(3))


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("this code must not run",))


def test_loading_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.ckpt", nn.Linear(3, 2), state={"callbacks": Hostile()})
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load_trainer_state(tmp_path / "a.ckpt")
    assert "must not run" not in capsys.readouterr().out


def test_every_kind_of_optimizer_state_comes_back(tmp_path: Path) -> None:
    """State of another shape than the parameter's, and a parameter that is a scalar."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        layer.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
        return layer, torch.optim.Adafactor(layer.parameters(), lr=0.1)

    def step(layer: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (layer.scale * layer(torch.ones(2, 4))).square().sum().backward()
        optimizer.step()

    layer, optimizer = build()
    step(layer, optimizer)
    save(tmp_path / "a.ckpt", layer, optimizer)
    step(layer, optimizer)
    again, fresh = build()
    checkpoint.load_parameters(tmp_path / "a.ckpt", again)
    checkpoint.load_optimizer(tmp_path / "a.ckpt", again, fresh)
    step(again, fresh)
    torch.testing.assert_close(dict(layer.named_parameters()), dict(again.named_parameters()), atol=0, rtol=0)
