"""Every callback in projects that do not otherwise use this package; copied, pickled and reused."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from test_other_adapters import Adapted

from lightning_pipelite import callbacks
from lightning_pipelite.callbacks import (
    AdapterNorms,
    CompositeWeightDecay,
    EvalSchedule,
    SaveTrained,
    StageTimes,
    StepProgress,
    TimedCheckpoint,
)
from projects import QUIET, Project, TwoOptimizers, loader, stream

MADE: dict[str, Callable[[Path], L.Callback]] = {
    "AdapterNorms": lambda folder: AdapterNorms(),
    "CompositeWeightDecay": lambda folder: CompositeWeightDecay(0.5),
    "EvalSchedule": lambda folder: EvalSchedule(1),
    "SaveTrained": lambda folder: SaveTrained(str(folder / "trained")),
    "StageTimes": lambda folder: StageTimes(),
    "StepProgress": lambda folder: StepProgress(style="lines"),
    "TimedCheckpoint": lambda folder: TimedCheckpoint(dirpath=str(folder / "checkpoints"), overwrite=True),
}


class Saves(Adapted):
    def __init__(self) -> None:
        super().__init__({})

    def save_trained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)


class SavesTwice(TwoOptimizers):
    save_trained = Saves.save_trained

    def __init__(self) -> None:
        super().__init__()
        self.layers = Adapted({}).layers
        self.loss = Adapted.loss.__get__(self)

    def configure_optimizers(self) -> Any:
        return [Project.configure_optimizers(self), Project.configure_optimizers(self)]


def trainer_with(callback: L.Callback, **options: Any) -> L.Trainer:
    own = {
        "enable_progress_bar": isinstance(callback, StepProgress),
        "enable_checkpointing": isinstance(callback, TimedCheckpoint),
    }
    return L.Trainer(callbacks=[callback], **{**QUIET, **own, **options})


def trained(callback: L.Callback, module: L.LightningModule, train: Any, evaluated: Any, **options: Any) -> L.Trainer:
    trainer = trainer_with(callback, **options)
    trainer.fit(module, train, evaluated)
    return trainer


def test_the_list_is_whole() -> None:
    assert sorted([*MADE, "Samples"]) == sorted(callbacks.__all__)  # Samples needs a module that writes text


@pytest.mark.parametrize("name", MADE)
def test_copied_pickled_and_used_again(name: str, tmp_path: Path) -> None:
    """As Lightning does when it spawns processes; before and after a training, and for a second training."""
    callback = MADE[name](tmp_path)
    for _ in range(2):
        for same in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert type(same) is type(callback)
            state = same.state_dict()
            assert state == callback.state_dict()
            json.dumps(state, default=float)
            same.load_state_dict(state)
            trained(same, Saves(), loader(), loader(1))
        trained(callback, Saves(), loader(), loader(1))


ELSEWHERE: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": True},
    "no evaluation": {"limit_val_batches": 0},
    "no logs": {"log_every_n_steps": 0},
    "a share": {"limit_train_batches": 0.5, "limit_val_batches": 0.5},
    "no training": {"limit_train_batches": 0},
    "no epochs": {"max_epochs": 0},
    "accumulated": {"accumulate_grad_batches": 3, "log_every_n_steps": 1},
    "by steps": {"max_steps": 5, "max_epochs": -1},
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("where", ELSEWHERE)
def test_flags(name: str, where: str, tmp_path: Path) -> None:
    trained(MADE[name](tmp_path), Saves(), loader(), loader(2), **ELSEWHERE[where])
    if where == "fast_dev_run":
        assert not any(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", MADE)
def test_data_and_modules(name: str, tmp_path: Path) -> None:
    """Data without a length, no evaluation, several evaluation sets, and manual optimization."""
    for number, (module, train, evaluated) in enumerate(
        [
            (Saves(), stream(), loader(1)),
            (Saves(), loader(), None),
            (Saves(), loader(), [loader(1), stream(2)]),
            (SavesTwice(), loader(), loader(1)),
        ]
    ):
        trainer = trained(MADE[name](tmp_path / str(number)), module, train, evaluated, log_every_n_steps=1)
        assert trainer.global_step == (32 if isinstance(module, SavesTwice) else 16)


@pytest.mark.parametrize("name", MADE)
def test_without_a_fit(name: str, tmp_path: Path) -> None:
    trainer_with(MADE[name](tmp_path)).validate(Saves(), loader(1), verbose=False)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", MADE)
def test_resumed(name: str, tmp_path: Path) -> None:
    """The first training is stopped within its second epoch."""
    steps: dict[str, Any] = {"max_epochs": -1, "max_steps": 11}
    first = trained(MADE[name](tmp_path / "a"), Saves(), loader(), loader(1), **steps)
    first.save_checkpoint(tmp_path / "at_11")
    second = trainer_with(MADE[name](tmp_path / "b"), **{**steps, "max_steps": 16})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second.fit(Saves(), loader(), loader(1), ckpt_path=tmp_path / "at_11", weights_only=False)
    assert second.global_step == 16


@pytest.mark.parametrize(
    ("evaluated", "monitor", "sentence"),
    [
        (loader(1), "eval/lost", "eval/lost is not among the logged metrics (eval/loss)"),
        (None, "eval/loss", "there are no evaluations"),
        (loader(1), "eval/loss", None),
        (None, None, None),
    ],
)
def test_a_monitor_that_is_never_logged_is_told_once(
    evaluated: Any, monitor: str | None, sentence: str | None, tmp_path: Path
) -> None:
    saving = TimedCheckpoint(dirpath=str(tmp_path / "checkpoints"), monitor=monitor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(saving, Project(), loader(), evaluated)
    told = [str(each.message) for each in caught if "TimedCheckpoint" in str(each.message)]
    expected = f"TimedCheckpoint(monitor={monitor!r}): no checkpoint is kept as the best: {sentence}."
    assert told == ([expected] if sentence else [])
    assert bool(saving.best_model_path) == (sentence is None and monitor is not None)
