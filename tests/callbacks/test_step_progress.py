"""The progress of a training under Lightning's own strategies; PipeLiteStrategy is not needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, TQDMProgressBar
from torch.utils.data import DataLoader, IterableDataset

import projects
from lightning_pipelite.callbacks import EvalSchedule, StepProgress
from lightning_pipelite.shared import progress, step_clock
from lightning_pipelite.shared.step_clock import StepClock
from terminal import terminal

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class Net(L.LightningModule):
    """On the tests' clock, a training batch takes a second and an evaluation batch a hundred."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.now = now

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.now[0] += 1
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/tokens_per_s", 12345.6, prog_bar=True)
        self.log("hidden", 1.0)
        return loss

    def validation_step(self, batch: torch.Tensor) -> None:
        self.now[0] += 100
        self.log("eval/loss", self.layer(batch).square().mean(), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=3e-4)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [0.0]
    for module in (progress, step_clock):
        monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def batches(number: int) -> DataLoader:
    return DataLoader(torch.ones(number, 2))


def fit(now: list[float], *callbacks: L.Callback, number: int = 12, **options: Any) -> L.Trainer:
    trainer = L.Trainer(callbacks=[*callbacks], **{**QUIET, "num_sanity_val_steps": 0, "max_epochs": 1, **options})
    trainer.fit(Net(now), batches(number), batches(2))
    return trainer


def test_lines_count_optimizer_steps_and_leave_out_evaluations(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(now, StepProgress(), EvalSchedule(evals_per_epoch=3), number=36, accumulate_grad_batches=6)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4  # EvalSchedule's
    lines = err.splitlines()
    assert re.fullmatch(
        r"training \(17 %\): step 1/6, 0:06, 0:30 left, loss [\d.e-]+, lr 3.0e-04, 12,346 tokens/s, eval/loss [\d.e-]+",
        next(line for line in lines if "step 1/" in line and "evaluating" not in line),
    )
    assert re.fullmatch(r"training \(100 %\): step 6/6, 0:36, loss [\d.e-]+, .*", lines[-1])
    # Each evaluation takes 200 s, none of which is counted.
    assert next(line for line in lines if "evaluating" in line).startswith("training (0 %): step 0/6, 0:00, evaluating")
    assert {line.split(", ")[1] for line in lines} <= {f"0:{6 * step:02}" for step in range(7)}


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_bars(now: list[float], kind: str) -> None:
    with terminal(kind, 160) as screen:
        fit(now, StepProgress(), EvalSchedule(evals_per_epoch=1), accumulate_grad_batches=5)
    assert "step 3/3, 0:12, loss" in screen.text
    assert "evaluating 2/2" in screen.text
    assert "step 2/3, 0:10, 0:05 left" in screen.text
    assert "Epoch" not in screen.text  # not Lightning's own bar
    assert re.search(r"step 3: eval/loss [\d.e-]+ \(", screen.text)


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
@pytest.mark.parametrize("columns", [80, 120])
def test_losses_stay_where_there_is_little_room(now: list[float], kind: str, columns: int) -> None:
    class Slow(Net):
        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            self.now[0] += 3599
            return super().training_step(batch)

    options = {**QUIET, "num_sanity_val_steps": 0, "max_epochs": 1, "accumulate_grad_batches": 2}
    with terminal(kind, columns) as screen:
        trainer = L.Trainer(callbacks=[StepProgress(), EvalSchedule(evals_per_epoch=2)], **options)
        trainer.fit(Slow(now), batches(12), batches(1))
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.text))
    last = [line for line in lines if "step 5/6, " in line][-1].rstrip()
    assert len(last) <= columns
    assert re.search(r"loss [\d.e-]+, (.*, )?eval/loss [\d.e-]+$", last), last
    assert ("12,346 tokens/s" in last) == (columns == 120)


def test_a_resumed_training_begins_where_it_was(
    now: list[float], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(now, StepProgress(), max_steps=4).save_checkpoint(tmp_path / "at_4")
    capsys.readouterr()
    trainer = L.Trainer(callbacks=[StepProgress()], max_steps=6, **QUIET)
    trainer.fit(Net(now), batches(12), batches(2), ckpt_path=tmp_path / "at_4", weights_only=False)
    assert "step 5/6, 0:01, 0:01 left" in capsys.readouterr().err


def test_without_an_end(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            while True:
                yield torch.ones(2)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    trainer = L.Trainer(callbacks=[StepProgress(), Stop()], max_epochs=-1, **QUIET)
    trainer.fit(Net(now), DataLoader(Endless()))
    assert capsys.readouterr().err.splitlines()[-1].startswith("training: step 3, 0:03, loss")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Epochs of 12 s have 6, 2, 1, 1, ... steps; after the first step, there is a line at most every ten seconds.
        ({}, {(1, 9), (6, 9), (8, 9), (9, 9)}),
        ({"max_steps": 8}, {(1, 8), (6, 8), (8, 8)}),
        ({"max_epochs": 1}, {(1, 6), (6, 6)}),
        ({"max_epochs": -1, "max_steps": 20}, {(step, 20) for step in (1, 6, *range(8, 21))}),
    ],
    ids=str,
)
def test_accumulation_that_changes(
    now: list[float], capsys: pytest.CaptureFixture[str], options: dict[str, Any], expected: set[tuple[int, int]]
) -> None:
    schedule = GradientAccumulationScheduler({0: 2, 1: 6, 2: 12})
    fit(now, StepProgress(), schedule, **{"max_epochs": 3, **options})
    shown = {(int(step), int(total)) for step, total in re.findall(r"step (\d+)/(\d+),", capsys.readouterr().err)}
    assert shown == expected


def test_a_resumed_training_that_accumulates_otherwise(
    now: list[float], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six steps of two batches each are followed by three of four."""
    fit(now, StepProgress(), accumulate_grad_batches=2).save_checkpoint(tmp_path / "at_6")
    capsys.readouterr()
    trainer = L.Trainer(callbacks=[StepProgress()], max_epochs=2, accumulate_grad_batches=4, **QUIET)
    trainer.fit(Net(now), batches(12), batches(2), ckpt_path=tmp_path / "at_6", weights_only=False)
    assert set(re.findall(r"step \d+/\d+", capsys.readouterr().err)) >= {"step 7/9", "step 9/9"}


@pytest.mark.parametrize(
    ("options", "end"), [({}, "step 32, 0:"), ({"max_epochs": -1, "max_steps": 20}, "step 20/20, ")]
)
def test_a_module_that_optimizes_by_itself(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any], end: str
) -> None:
    """With two steps per batch, the total is known only from max_steps."""
    trainer = L.Trainer(callbacks=[StepProgress()], **{**projects.QUIET, "enable_progress_bar": True, **options})
    trainer.fit(projects.TwoOptimizers(), projects.loader())
    lines = capsys.readouterr().err.splitlines()
    assert end in lines[-1]
    assert all(("/" in line.split(",")[0]) == bool(options) for line in lines if "step" in line)


def test_an_optimizer_without_a_rate(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> Any:
            return closure()

    class Own(Net):
        def configure_optimizers(self) -> Any:
            return Rateless(self.parameters())

    L.Trainer(callbacks=[StepProgress()], max_epochs=1, **QUIET).fit(Own(now), batches(3), batches(1))
    assert "lr" not in capsys.readouterr().err.splitlines()[-1]


def test_evaluation_alone(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = L.Trainer(callbacks=[StepProgress()], **QUIET)
    trainer.validate(Net(now), batches(3), verbose=False)
    trainer.test(Net(now), batches(1), verbose=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "batch" in line]
    assert lines == [
        "evaluating (33 %): batch 1/3, 1:40",
        "evaluating (67 %): batch 2/3, 3:20",
        "evaluating (100 %): batch 3/3, 5:00",
        "testing (100 %): batch 1/1, 1:40",
    ]


def test_it_ends_with_an_error_and_can_be_disabled(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    class Fail(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ZeroDivisionError

    bar = StepProgress()
    with pytest.raises(ZeroDivisionError):
        fit(now, bar, Fail())
    assert bar._view is None
    capsys.readouterr()
    bar = StepProgress()
    bar.disable()
    fit(now, bar)
    assert "step" not in capsys.readouterr().err


def test_one_may_show_something_else(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    class Own(StepProgress):
        def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
            return {"mood": "good"}

    fit(now, Own(), number=1)
    assert "step 1/1, 0:01, mood good" in capsys.readouterr().err


def test_the_command_line_takes_a_users_bar_instead() -> None:
    from lightning_pipelite.cli.fit import TrainerCLI

    def kinds(*given: L.Callback, shows_progress: bool = True) -> list[str]:
        return [type(each).__name__ for each in TrainerCLI._missing([*given], shows_progress=shows_progress)]

    assert kinds() == ["StepProgress", "StageTimes"]
    assert kinds(TQDMProgressBar()) == ["StageTimes"]
    assert kinds(shows_progress=False) == ["StageTimes"]


def test_the_clock_forgets_the_first_step(now: list[float]) -> None:
    clock = StepClock()
    assert clock.remaining(5) is None
    for seconds in (100, 2, 4):
        now[0] += seconds
        clock.pause()
        now[0] += 1000
        clock.pause()
        clock.go_on()
        clock.step()
        if seconds == 100:
            assert clock.remaining(5) == 500
    assert clock.elapsed == 106
    assert clock.remaining(5) == 15
