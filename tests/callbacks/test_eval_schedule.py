"""EvalSchedule in projects with Lightning's own strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_pipelite.callbacks import EvalSchedule
from lightning_pipelite.errors import ConfigurationError
from projects import QUIET, Evaluations, Project, TwoOptimizers, loader, stream


def evaluated(
    evals: int, train: Any = None, module: L.LightningModule | None = None, callbacks: Any = (), **options: Any
) -> list[int]:
    """Train; return the steps after which it evaluated. An epoch of the default data has eight batches."""
    seen = Evaluations()
    trainer = L.Trainer(callbacks=[EvalSchedule(evals), seen, *callbacks], **{**QUIET, **options})
    trainer.fit(module or Project(), loader() if train is None else train, loader(2))
    return seen.steps


@pytest.mark.parametrize(
    ("evals", "train", "options", "steps"),
    [
        (2, loader, {}, [0, 4, 8, 12, 16]),
        (3, loader, {"accumulate_grad_batches": 3}, [0, 1, 2, 3, 4, 5, 6]),
        (1, loader, {"max_steps": 11}, [0, 8, 11]),
        (2, loader, {"check_val_every_n_epoch": 2, "max_epochs": 4}, [0, 12, 16, 28, 32]),
        (2, loader, {"limit_train_batches": 0.5}, [0, 2, 4, 6, 8]),
        (2, loader, {"fast_dev_run": True}, [0, 1]),
        (2, loader, {"limit_val_batches": 0}, []),
        (1, stream, {}, [0, 8, 16]),
        (1, stream, {"accumulate_grad_batches": 3}, [0, 3, 6]),
        (1, stream, {"max_steps": 11, "max_epochs": -1}, [0, 8, 11]),
        (2, stream, {"limit_train_batches": 4}, [0, 2, 4, 6, 8]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_steps(evals: int, train: Any, options: dict[str, Any], steps: list[int]) -> None:
    assert evaluated(evals, train(), **options) == steps


def test_accumulation_that_changes() -> None:
    assert evaluated(2, callbacks=[GradientAccumulationScheduler({0: 2, 1: 4})]) == [0, 2, 4, 5, 6]


def test_a_module_that_optimizes_by_itself() -> None:
    """Each batch takes two steps, so that the eleventh step falls within the sixth batch."""
    assert evaluated(2, module=TwoOptimizers()) == [0, 8, 16, 24, 32]
    assert evaluated(2, module=TwoOptimizers(), max_steps=11) == [0, 8, 12]


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"val_check_interval": "00:01:00:00"},
        {"val_check_interval": 1},
        {"val_check_interval": 0.5},
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_another_schedule_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="both set when to evaluate"):
        evaluated(2, **options)


def test_parts_of_an_epoch_without_length_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be divided into 2 parts"):
        evaluated(2, stream())


def test_without_evaluation_data() -> None:
    seen = Evaluations()
    L.Trainer(callbacks=[EvalSchedule(2), seen], **QUIET).fit(Project(), loader())
    assert seen.steps == []


def test_several_sets_are_told_and_a_second_fit_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = EvalSchedule(1)
    for _ in range(2):
        trainer = L.Trainer(callbacks=[schedule], **{**QUIET, "max_epochs": 1})
        trainer.fit(Project(), loader(), [loader(1), loader(2)])
        trainer.validate(Project(), loader(1), verbose=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 8", "step 8"] * 2
    assert "eval/loss/dataloader_idx_1" in lines[0]
    assert "since the last" not in lines[3]
    assert lines[3] == lines[0]


def test_resumed_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = L.Trainer(callbacks=[EvalSchedule(2)], **{**QUIET, "max_epochs": 1})
    first.fit(Project(), loader(), loader(2))
    first.save_checkpoint(tmp_path / "one")
    capsys.readouterr()
    seen = Evaluations()
    second = L.Trainer(callbacks=[EvalSchedule(2), seen], **QUIET)
    second.fit(Project(), loader(), loader(2), ckpt_path=tmp_path / "one")
    assert seen.steps == [12, 16]
    assert "since the last" in capsys.readouterr().out.splitlines()[0]
