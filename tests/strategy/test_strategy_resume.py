"""A resumed training does what an uninterrupted one does, wherever it was interrupted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import Workers
from resume_jobs import train, train_and_save, train_and_stop, train_with_model_checkpoint

# Ten micro-batches an epoch, two a step, an evaluation after every fourth; batch-04 is the first of the third step.
HOOKS = (
    "batch-00", "batch-01", "batch-03", "batch-04", "batch-06", "batch-09", "batch-10", "batch-13", "batch-14",
    "batch-29", "epoch-09", "epoch-29", "eval-03", "eval-17",
)  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request: pytest.FixtureRequest, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("everywhere")
    return request.param, folder, workers.run(request.param, train_and_save, str(folder), request.param)[0]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("limit", [{}, {"max_steps": 15, "max_epochs": -1}], ids=["epochs", "steps"])
def test_to_the_bit_from_every_hook(undisturbed: Any, workers: Workers, hook: str, limit: dict[str, int]) -> None:
    """Losses, norms, evaluations and epochs are equal at equal steps, despite dropout and random noise in the data."""
    stages, folder, reference = undisturbed
    resumed = workers.run(stages, partial(train, **limit), stages, 1, 2, str(folder / f"{hook}.ckpt"))[0]
    assert resumed["lines"] == reference["lines"][len(reference["lines"]) - len(resumed["lines"]) :]
    assert len(resumed["lines"]) >= (0 if hook.endswith("29") else 20)
    assert (resumed["step"], resumed["rates"]) == (15, reference["rates"])
    over = hook == "batch-29" and "max_steps" in limit  # then Lightning does not end the epoch
    assert resumed["epoch"] == (2 if over else 3)
    torch.testing.assert_close(resumed["weights"], reference["weights"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 1, 1), (2, 1, 1)),
        ((2, 1, 1), (2, 1, 2)),
        ((2, 1, 2), (4, 1, 1)),
        ((4, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (1, 2, 1)),
        ((1, 2, 1), (1, 1, 1)),
        ((2, 2, 2), (1, 1, 1)),
    ],
)
def test_with_other_stages_and_replicas(
    workers: Workers, tmp_path: Path, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    """``before`` and ``after`` are the numbers of stages, of replicas, and of pieces per stage."""
    (stages, replicas, pieces), (stages_now, replicas_now, pieces_now) = before, after
    reference = workers.run(
        stages * replicas, partial(train_quietly, virtual_stages=pieces), str(tmp_path), stages, replicas,
        4 // replicas,
    )[0]  # fmt: skip
    checkpoint = str(tmp_path / f"batch-{8 // replicas - 1:02d}.ckpt")
    resumed = workers.run(
        stages_now * replicas_now, partial(train_quietly, virtual_stages=pieces_now), None, stages_now, replicas_now,
        4 // replicas_now, checkpoint,
    )[0]  # fmt: skip
    tail = reference["lines"][len(reference["lines"]) - len(resumed["lines"]) :]
    assert len(tail) > 20
    for (step, key, value), (step_now, key_now, value_now) in zip(tail, resumed["lines"], strict=True):
        assert (step_now, key_now) == (step, key)
        assert value_now == pytest.approx(value, abs=1e-6, rel=1e-5 if key == "train/grad_norm" else 0)
    torch.testing.assert_close(resumed["weights"], reference["weights"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("before", [False, True])
def test_with_the_optimizer_offloaded_or_no_longer(workers: Workers, tmp_path: Path, before: bool) -> None:
    """Also when the state was saved with another number of stages."""
    reference = workers.run(1, partial(train_and_save, noisy=False, offload=before), str(tmp_path))[0]
    (resumed, _) = workers.run(
        2, partial(train, noisy=False, offload=not before), 2, 1, 2, str(tmp_path / "batch-03.ckpt")
    )
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, atol=1e-6, rtol=0)
    assert resumed["rates"] == reference["rates"]


def train_quietly(folder: str | None, *args: Any, **options: Any) -> dict[str, Any]:
    """Train without noise that depends on how often a process draws."""
    return train_and_save(folder, *args, noisy=False, **options) if folder else train(*args, noisy=False, **options)


def test_another_global_batch_is_refused(workers: Workers, tmp_path: Path) -> None:
    workers.run(1, train_and_save, str(tmp_path), 1, 1, 2)
    refused = workers.run(2, train, 1, 2, 2, str(tmp_path / "batch-03.ckpt"))
    assert {each["error"] for each in refused} == {
        "ckpt_path: the checkpoint was trained with 2 micro-batches per step (2 on each of 1 replica), not 4 (2 on "
        "each of 2): set accumulate_grad_batches to 1."
    }


@pytest.mark.parametrize("ends", [(4, 7, 10, 15), (5, 10, 12, 15), (5, 7, 10, 15)])
def test_resumed_again_and_again_with_more_steps_than_planned(
    workers: Workers, tmp_path: Path, ends: tuple[int, ...]
) -> None:
    """From what TimedCheckpoint saves at the end of each training; epochs end at 5, 10 and 15."""
    reference = workers.run(1, train)[0]
    lines, last = [], None
    for steps in ends:
        run = workers.run(1, train_timed, str(tmp_path), last, steps)[0]
        assert run["step"] == steps
        lines += run["lines"]
        last = "last"
    assert lines == reference["lines"]


def train_timed(folder: str, ckpt_path: str | None, steps: int) -> dict[str, Any]:
    from lightning_pipelite.callbacks import TimedCheckpoint

    return train(ckpt_path=ckpt_path, callbacks=(TimedCheckpoint(dirpath=folder),), max_steps=steps, max_epochs=-1)


def test_model_checkpoint_with_last_and_best(workers: Workers, tmp_path: Path) -> None:
    reference = workers.run(2, train_with_model_checkpoint, str(tmp_path / "a"), None, 15)[0]
    for steps in (5, 9, 15):  # after resuming, the first save is requested in the middle of a step
        run = workers.run(2, train_with_model_checkpoint, str(tmp_path / "b"), "last", steps)[0]
    tail = reference["lines"][len(reference["lines"]) - len(run["lines"]) :]
    assert len(tail) > 15
    assert run["lines"] == tail
    assert run["best"] == pytest.approx(min(value for _, key, value in reference["lines"] if key == "eval/loss"))
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(run["kept"])
    assert len(run["kept"]) == 3


@pytest.mark.parametrize("limit", [{}, {"max_steps": 15, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("stop", "saving"), [(14, "timed"), (13, "timed"), (14, "lightning"), (14, "end")])
def test_stopped_within_an_epoch(
    workers: Workers, tmp_path: Path, stop: int, saving: str, limit: dict[str, int]
) -> None:
    """By should_stop, as Timer and EarlyStopping do: Lightning then calls on_train_epoch_end; 13 is within a step."""
    losses, weights = [], []
    for folder, stops in (("a", (None,)), ("b", (stop, None))):
        found = []
        for number, stops_at in enumerate(stops):
            run = workers.run(1, partial(train_and_stop, **limit), str(tmp_path / folder), saving, stops_at, number > 0)
            found += [line for line in run[0]["lines"] if line[1] == "train/loss"]
        losses.append(found)
        weights.append(run[0]["weights"])
        assert run[0]["epoch"] == 3
    assert losses[1] == losses[0]
    assert len(losses[0]) == 15
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


@pytest.mark.parametrize("steps", [5, 7])
def test_saved_when_training_has_ended(workers: Workers, tmp_path: Path, steps: int) -> None:
    """Saved in on_train_end; an epoch ends at step 5."""
    reference = workers.run(1, train)[0]
    lines: list[Any] = []
    for number, end in enumerate((steps, 15)):
        ended = partial(train_and_stop, max_steps=end, max_epochs=-1)
        lines += workers.run(1, ended, str(tmp_path), "end", None, number > 0)[0]["lines"]
    assert lines == reference["lines"]


@pytest.mark.parametrize("ends", [(4, 10, 15), (5, 10, 15), (5, 7, 15)])
def test_the_same_with_lightnings_own_strategy(workers: Workers, tmp_path: Path, ends: tuple[int, ...]) -> None:
    """TimedCheckpoint works without PipeLiteStrategy: a training that is resumed twice has the same losses."""
    reference = workers.run(1, train_plainly, str(tmp_path / "a"), None, 15)[0]
    lines, last = [], None
    for steps in ends:
        lines += workers.run(1, train_plainly, str(tmp_path / "b"), last, steps)[0]["lines"]
        last = "last"
    assert lines == reference["lines"]
    kept = sorted({5, 10, 15, *ends})[-3:]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [f"step={step:08d}.ckpt" for step in kept]


def train_plainly(folder: str, ckpt_path: str | None, steps: int) -> dict[str, Any]:
    from lightning_pipelite.callbacks import TimedCheckpoint

    saving = TimedCheckpoint(dirpath=folder)
    return train(ckpt_path=ckpt_path, callbacks=(saving,), max_steps=steps, max_epochs=-1, plain=True, noisy=False)
