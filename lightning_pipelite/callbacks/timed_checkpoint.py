"""Saves checkpoints by the clock, at the end of each epoch, and on request."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_pipelite.callbacks.support.former_result import refuse_former_result
from lightning_pipelite.callbacks.support.signals import SAVE, SAVE_AND_PASS_ON, STOPS, Signals
from lightning_pipelite.callbacks.support.step_checkpoints import StepCheckpoints, step_of
from lightning_pipelite.checkpoint.loop_state import after_last_batch
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.interrupt import name_of
from lightning_pipelite.shared.local_path import refuse_remote
from lightning_pipelite.shared.protocol import SavesTrained

TRIGGER = "save_now"


class TimedCheckpoint(ModelCheckpoint):
    """Saves ``step=NUMBER.ckpt`` by wall-clock time and at the end of each epoch, and keeps the newest ones.

    It also saves at the end of the current step

    - on SIGUSR1, or if there is a file ``save_now`` in ``dirpath``, which is then removed; training continues;
    - on SIGTERM and Ctrl-C, which then end training with exit status 143 or 130, as if the signal had killed the
      process; a second Ctrl-C ends it at once.

    A signal to any rank counts; rank 0 watches the clock and the file. If the module has a method
    ``save_trained(directory)``, the trained weights are also written at the end of each epoch, to
    ``epoch=NUMBER.trained`` beside the checkpoint. It works with any strategy. As a subclass of ModelCheckpoint, it
    serves ``ckpt_path="last"`` and, with a ``monitor``, ``"best"``.

    Args:
        checkpoint_interval_hours: The time between two checkpoints.
        max_checkpoints: How many to keep, the newest by step; 0 keeps all. An old one is deleted only once its
            successor is on disk, so there is always a complete one.
        dirpath: Directory of the checkpoints.
        monitor: A metric; each evaluation that is the best so far is then saved, and the best is kept in addition to
            the newest.
        mode: Whether the best is the ``min`` or the ``max``.
        overwrite: Start from scratch in a directory with the checkpoints of another training, which are then deleted
            like its own; otherwise only a resumed training may write there.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    def __init__(
        self,
        checkpoint_interval_hours: float = 1.0,
        max_checkpoints: int = 3,
        dirpath: str = "checkpoints",
        monitor: str | None = None,
        mode: str = "min",
        overwrite: bool = False,
    ) -> None:
        refuse_remote(dirpath, "TimedCheckpoint: dirpath")
        if checkpoint_interval_hours <= 0:
            raise ConfigurationError(
                f"TimedCheckpoint: checkpoint_interval_hours must be positive, not {checkpoint_interval_hours}."
            )
        if max_checkpoints < 0:
            raise ConfigurationError(f"TimedCheckpoint: max_checkpoints must be at least 0, not {max_checkpoints}.")
        if not dirpath or mode not in ("min", "max"):
            raise ConfigurationError(
                f"TimedCheckpoint: dirpath is {dirpath!r} and mode is {mode!r}; dirpath must not be empty, and mode "
                "must be min or max."
            )
        super().__init__(dirpath=dirpath, monitor=monitor, mode=mode, save_top_k=-1)
        self.checkpoint_interval_hours = checkpoint_interval_hours
        self.max_checkpoints = max_checkpoints
        self.overwrite = overwrite
        self._files = StepCheckpoints(Path(str(self.dirpath)))
        self._signals = Signals()
        self._saved_at = 0.0
        self._request = 0  # what to do after the evaluation that follows
        self._unpruned = False
        self._warned = False
        self._failure: Exception | None = None  # of save_trained

    @property
    @override
    def state_key(self) -> str:
        return "TimedCheckpoint"

    def former_result(self) -> str | None:
        """Return an error message if training from scratch would replace or delete earlier results."""
        directory = self._files.directory
        found = sorted([*self._files, *directory.glob("epoch=*.trained")])
        if self.overwrite or not found:
            return None
        return (
            f"TimedCheckpoint: {directory} has {found[-1].name} from another training; resume it with ckpt_path=last, "
            "choose a new dirpath, or set overwrite (--overwrite) to replace its contents."
        )

    # When to save

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        self._files = StepCheckpoints(Path(str(self.dirpath)))
        for callback in trainer.checkpoint_callbacks:
            if callback is not self and isinstance(callback, ModelCheckpoint):
                self._require_other_names(callback)

    def _require_other_names(self, other: ModelCheckpoint) -> None:
        """Refuse another callback whose files this one would mistake for its own and delete."""
        directory = self._files.directory
        if other.dirpath is None or Path(str(other.dirpath)).absolute() != directory.absolute():
            return
        numbers = {"epoch": torch.tensor(0), "step": torch.tensor(1)}
        if isinstance(other, TimedCheckpoint) or step_of(other.format_checkpoint_name(numbers)) is not None:
            raise ConfigurationError(
                f"TimedCheckpoint and another {type(other).__name__} would overwrite each other's files in "
                f"{directory}; give one of them another dirpath."
            )

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        after_last_batch(checkpoint["loops"]["fit_loop"], trainer.max_steps != -1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_former_result(trainer, self.former_result())
        self._saved_at = time.monotonic()
        self._last_global_step_saved = trainer.global_step  # nothing to save until a step is taken
        self._request, self._warned = 0, False
        if self.monitor and not trainer.enable_validation:
            self._warn_once("there are no evaluations")
        if not _only_tries(trainer):
            self._signals.listen()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if _only_tries(trainer) or trainer.fit_loop._should_accumulate():
            return
        self._prune(trainer)
        self._request = self._of_any_rank(trainer, self._wish(trainer))
        if (
            0 < trainer.max_steps <= trainer.global_step
            and not trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        ):
            self._request = max(self._request, SAVE)  # when training ends, Lightning counts the epoch as complete
        epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        # A due evaluation goes first: Lightning would skip it on resuming from a checkpoint saved before it.
        if not (fetcher is not None and epoch_loop._should_check_val_fx(fetcher)):
            self._answer(trainer)

    @staticmethod
    def _of_any_rank(trainer: pl.Trainer, wish: int) -> int:
        """Return the largest wish of all ranks. Collective."""
        wishes = torch.tensor(wish, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(wishes, reduce_op="max"))

    def _wish(self, trainer: pl.Trainer) -> int:
        """Return what this rank requests."""
        wish = self._signals.take()
        if trainer.is_global_zero:
            due = time.monotonic() - self._saved_at >= 3600 * self.checkpoint_interval_hours
            if due or (self._files.directory / TRIGGER).exists():
                wish = max(wish, SAVE)
        return wish

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or _only_tries(trainer) or trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.global_step > 0 and self._is_best(trainer):
            self._request = max(self._request, SAVE)
        self._request = max(self._request, self._of_any_rank(trainer, self._signals.take()))
        self._answer(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _only_tries(trainer):
            return
        if isinstance(pl_module, SavesTrained):
            directory = self._files.directory / f"epoch={trainer.current_epoch}.trained"
            try:  # before the checkpoint: a run resumed from that does not get here again
                pl_module.save_trained(directory)
                self._failure = None
            except Exception as error:  # must not cost the checkpoint as well
                rank_zero_warn(f"{directory} could not be written ({error}); training continues.")
                self._failure = error
        self._request = max(self._request, SAVE)
        self._answer(trainer, ends_epoch=True)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prune(trainer)
        if (failure := self._failure) is not None:  # in the last epoch
            self._failure = None
            raise failure

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._signals.ignore()

    # Saving

    def _answer(self, trainer: pl.Trainer, ends_epoch: bool = False) -> None:
        """Carry out the request, if any; after the last batch of an epoch, wait for the end of the epoch."""
        if not self._request or (trainer.fit_loop.epoch_loop._num_ready_batches_reached() and not ends_epoch):
            return
        request, self._request = self._request, 0
        self._save(trainer)
        if trainer.is_global_zero:
            with contextlib.suppress(OSError):  # a broken disk need not end training
                (self._files.directory / TRIGGER).unlink()
        if request == SAVE_AND_PASS_ON:
            self._signals.pass_on()
        if signum := STOPS.get(request):
            told = f"{name_of(signum)}: training ends after step {trainer.global_step}; resume with ckpt_path=last."
            trainer.print(told)
            raise SIGTERMException(128 + signum)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved_at = time.monotonic()
        if self._last_global_step_saved == trainer.global_step:
            return
        self._save_checkpoint(trainer, str(self._files.of_step(trainer.global_step)))
        self._unpruned = True
        self._prune(trainer)

    def _is_best(self, trainer: pl.Trainer) -> bool:
        """Return whether this evaluation is the best so far; rank 0 decides."""
        if not self.monitor:
            return False
        current = trainer.callback_metrics.get(self.monitor)
        if current is None:
            self._warn_once(
                f"{self.monitor} is not among the logged metrics "
                f"({', '.join(sorted(trainer.callback_metrics)) or 'none'})"
            )
        better = False
        if isinstance(current, Tensor) and not current.isnan():
            best = self.best_model_score
            better = best is None or bool(current < best if self.mode == "min" else current > best)
        score = trainer.strategy.broadcast(current.detach().cpu() if better and current is not None else None)
        if score is None:
            return False
        self.best_model_score = score
        self.best_model_path = str(self._files.of_step(trainer.global_step))
        return True

    def _warn_once(self, why: str) -> None:
        if not self._warned:
            rank_zero_warn(f"TimedCheckpoint(monitor={self.monitor!r}): no checkpoint is kept as the best: {why}.")
        self._warned = True

    # What is kept

    def _prune(self, trainer: pl.Trainer) -> None:
        """Delete surplus checkpoints once the newest exists: a strategy may write it in the background."""
        newest = Path(self._last_checkpoint_saved)
        if not self._unpruned or not trainer.is_global_zero or not newest.exists():
            return
        self._unpruned = False
        if self.max_checkpoints == 0:
            return
        for path in self._files.from_newest(newest)[self.max_checkpoints :]:
            if str(path) != self.best_model_path:
                trainer.strategy.remove_checkpoint(str(path))

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        newest = max(self._files, key=lambda path: (path.stat().st_mtime, path.name), default=None)
        return {str(newest)} if newest else set()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_model_path": self.best_model_path, "best_model_score": self.best_model_score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if Path(state_dict["best_model_path"]).exists():
            self.best_model_path = state_dict["best_model_path"]
            self.best_model_score = state_dict["best_model_score"]


def _only_tries(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
