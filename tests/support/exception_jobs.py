"""Trainings that an error stops at any point, and the checkpoints written because of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

from resume_jobs import train

PLACES = {  # calls of a hook, counted from 1: ten micro-batches an epoch, two a step, an evaluation after every fourth
    "on_train_start": (1,),
    "on_train_epoch_start": (1, 2),
    "on_train_batch_start": (1, 2, 3, 5, 11, 12),
    "on_before_zero_grad": (2,),
    "on_before_optimizer_step": (1, 3, 6),
    "on_train_batch_end": (1, 4, 5, 6, 10, 14, 20),
    "on_validation_start": (1,),
    "on_validation_batch_start": (4, 14),
    "on_validation_batch_end": (10,),
    "on_validation_epoch_end": (2,),
    "on_validation_end": (1, 3),
    "on_train_epoch_end": (1,),
    "loader": (1, 4, 5, 9, 11),
    "loss": (1, 3, 6),
}


class StoppedError(Exception):
    pass


class FailAt(L.Callback):
    """Raises at a given call of a hook, counted from 1."""

    def __init__(self, hook: str, call: int) -> None:
        self.calls, self.call = 0, call
        if hook not in ("loader", "loss"):
            setattr(self, hook, self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            raise StoppedError


class SaveOnException(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
        assert Path(self.path, "manifest.json").exists()


def failing(folder: str, hook: str, call: int, stages: int = 1, **options: Any) -> bool:
    """Return whether a training that fails at a call of a hook writes a checkpoint."""
    import resume_jobs

    fails, calls = FailAt(hook, call), {"loader": resume_jobs.Noisy.__iter__, "loss": resume_jobs.token_loss}
    made = resume_jobs.make

    def counting(items: Any) -> Any:
        for item in calls["loader"](items):
            fails.count()
            yield item

    def token_loss(outputs: Any, targets: Any) -> Any:
        if torch.is_grad_enabled():
            fails.count()
        return calls["loss"](outputs, targets)

    def make() -> Any:
        module = made()
        module.model.loss = token_loss if hook == "loss" else module.model.loss
        return module

    resume_jobs.make = make
    if hook == "loader":
        resume_jobs.Noisy.__iter__ = counting  # type: ignore[method-assign]
    path = f"{folder}/{hook}-{call}.ckpt"
    try:
        train(stages, callbacks=(SaveOnException(path), EarlyStopping("eval/loss", patience=99), fails),
              num_sanity_val_steps=0, **options)  # fmt: skip
    except StoppedError:
        return Path(path).exists()
    finally:
        resume_jobs.make = made
        resume_jobs.Noisy.__iter__ = calls["loader"]  # type: ignore[method-assign]
    raise AssertionError(f"{hook} was not called {call} times")


def resume(path: str, **options: Any) -> dict[str, Any]:
    return train(ckpt_path=path, callbacks=(EarlyStopping("eval/loss", patience=99),), **options)


def with_lightnings(folder: str, kind: str, stages: int, raises: bool = True) -> Any:
    """Train with Lightning's own callbacks for it; return the message or the files."""
    saving = {
        "model": lambda: ModelCheckpoint(folder, save_on_exception=True, save_top_k=0),
        "model, last": lambda: ModelCheckpoint(folder, save_on_exception=True, save_last=True, every_n_epochs=9),
        "exception": lambda: OnExceptionCheckpoint(folder),
    }[kind]()
    try:
        done = train(stages, callbacks=(saving, *([FailAt("on_train_batch_end", 4)] if raises else ())))
    except StoppedError:
        return sorted(path.name for path in Path(folder).iterdir())
    return done.get("error")


def saved_in_a_step(folder: str, stages: int) -> list[bool]:
    """Save from a callback in the last hook of a step before an evaluation, right before an error on all ranks."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(f"{folder}/mine.ckpt")
                raise StoppedError

    try:
        train(stages, callbacks=(Save(),))
    except StoppedError:
        return [Path(folder, "mine.ckpt", "manifest.json").exists()]
    return []


def saved_at_the_end(folder: str, stages: int) -> dict[str, bool]:
    """Save in hooks that run after the strategy's teardown; return whether each checkpoint exists at once."""
    found: dict[str, bool] = {}

    class Save(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.save(trainer, "on_fit_end")

        def teardown(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
            self.save(trainer, "teardown")

        def save(self, trainer: L.Trainer, hook: str) -> None:
            trainer.save_checkpoint(f"{folder}/{hook}.ckpt")
            found[hook] = Path(folder, f"{hook}.ckpt", "manifest.json").exists()

    train(stages, callbacks=(Save(),), max_steps=3, max_epochs=-1)
    return found
