"""Trainings with TimedCheckpoint that are asked to save in many ways."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L

from lightning_pipelite.callbacks import SaveTrained, TimedCheckpoint
from resume_jobs import train


class At(L.Callback):
    """Runs actions in given steps."""

    def __init__(self, actions: dict[int, Any]) -> None:
        self.actions = actions

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if action := self.actions.pop(trainer.global_step + 1, None):
            action()


def saved(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []


def asked(folder: str, way: str, stages: int = 2) -> dict[str, Any]:
    """Ask to save on the last rank in step 4 of 8, within the first epoch and not before an evaluation."""
    asks = int(os.environ["RANK"]) == stages - 1
    requeued: list[int] = []

    def ask() -> None:
        if way == "trigger":
            (Path(folder) / "save_now").write_text("")
        elif asks:
            os.kill(os.getpid(), getattr(signal, way))

    signal.signal(signal.SIGUSR1, lambda *_: requeued.append(1))  # as Lightning does under Slurm
    status = 0
    Path(folder).mkdir(exist_ok=True)
    try:
        train(stages, callbacks=(TimedCheckpoint(1000, 0, folder), At({4: ask})), max_steps=8, max_epochs=-1)
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    return {"saved": saved(folder), "status": status, "requeued": len(requeued)}


def by_the_clock(folder: str, keep: int, monitor: str | None) -> dict[str, Any]:
    """Save by the clock: by that of rank 0 in every step, by that of the others never."""
    hours = 1e-9 if int(os.environ["RANK"]) == 0 else 1e9
    saving = TimedCheckpoint(hours, keep, folder, monitor=monitor)
    train(2, callbacks=(saving,), max_steps=8, max_epochs=-1)
    return {"saved": saved(folder), "best": Path(saving.best_model_path).name, "score": saving.best_model_score}


def on_a_full_disk(folder: str) -> dict[str, Any]:
    """Train while nothing can be written from step 4 to 6."""
    path, hidden = Path(folder), Path(folder).with_name("hidden")
    seen: list[list[str]] = []

    def block() -> None:
        for _ in range(500):  # wait for the background write
            if "step=00000003.ckpt" in (names := saved(folder)) and not names[0].startswith("."):
                break
            time.sleep(0.01)
        path.rename(hidden)
        path.write_text("a file in the place of the directory")

    def unblock() -> None:
        path.unlink()
        hidden.rename(path)
        seen.append(saved(folder))

    actions = {4: block, 7: unblock} if int(os.environ["RANK"]) == 0 else {}
    done = train(2, callbacks=(TimedCheckpoint(1e-9, 1, folder), At(actions)), max_steps=9, max_epochs=-1)
    return {"saved": saved(folder), "seen": seen, "step": done["step"]}


def failing_to_save(folder: str) -> dict[str, Any]:
    """Fail to write what was trained, not because of the disk; then resume from where training had ended."""
    import resume_jobs

    def save_trained(self: Any, directory: Path) -> None:
        raise KeyError("no such layer")

    error, told = "", io.StringIO()
    resume_jobs.Scheduled.save_trained = save_trained  # type: ignore[attr-defined]
    try:
        train(1, callbacks=(TimedCheckpoint(1000, 0, folder), SaveTrained(f"{folder}/result")), max_epochs=1)
    except KeyError as raised:
        error = str(raised)
    finally:
        del resume_jobs.Scheduled.save_trained  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(told):
        train(1, callbacks=(TimedCheckpoint(1000, 0, folder),), max_epochs=1, ckpt_path="last")
    return {"saved": saved(folder), "error": error, "told": told.getvalue()}
