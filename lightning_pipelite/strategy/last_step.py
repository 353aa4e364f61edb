"""Where a training stood when its last step ended, which is what every checkpoint saves, whenever it is requested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from lightning_pipelite.checkpoint.loop_state import at_step_end, before_evaluation, before_training, between_batches
from lightning_pipelite.strategy.layer_rng import LayerRNG


@dataclass(frozen=True)
class _Note:
    """What cannot be found out later: Lightning's loop counts micro-batches, and fetches some of the next ahead."""

    batches: int  # in the whole training so far
    steps: int
    loaders: list[Any]
    generators: dict[str, Any]


class LastStep:
    """Keeps track of the steps of a training.

    Args:
        trainer: Runs the loops.
        layer_rng: Holds the random number generators.
    """

    def __init__(self, trainer: pl.Trainer, layer_rng: LayerRNG) -> None:
        self._trainer, self._layer_rng = trainer, layer_rng
        self._ended: _Note | None = None  # None until training starts
        self._under_way: _Note | None = None  # of the step whose micro-batches have all been taken
        self._weights_change = False
        self._evaluated = False  # right after the step that ended last

    # During training

    def training_starts(self) -> None:
        """Note that the data loaders have been created."""
        self._ended, self._under_way, self._evaluated = self._note(), None, False

    def batches_taken(self) -> None:
        """Note that the gradients of a step have been computed."""
        self._settle()
        self._under_way, self._weights_change = self._note(), False

    def weights_change(self) -> None:
        """Note that the weights are about to change."""
        self._weights_change = True

    def evaluation_ended(self) -> None:
        """Note that the callbacks of an evaluation within the training have run."""
        if self._settle() == 0:
            self._ended, self._evaluated = self._note(), True

    def _note(self) -> _Note:
        loader = self._trainer.fit_loop._combined_loader
        loaders = loader._state_dicts() if loader is not None and self._trainer.is_global_zero else []
        return _Note(self._batches, self._trainer.global_step, loaders, self._layer_rng.state())

    @property
    def _batches(self) -> int:
        return int(self._trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def _settle(self) -> int:
        """Update the notes, and return how many micro-batches have been taken since the last step ended."""
        if self._under_way is not None and self._trainer.global_step > self._under_way.steps:
            self._ended, self._under_way, self._evaluated = self._under_way, None, False
        return self._batches - (self._ended.batches if self._ended is not None else self._batches)

    # For a checkpoint

    def state(self, loops: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], bool]:
        """Return where the training stood.

        Args:
            loops: The current states of all of Lightning's loops.

        Returns:
            The states of the loops and of the generators at that time, and whether an evaluation follows, with which a
            resumed training continues.

        Raises:
            RuntimeError: If an error stopped the training while a step was changing the weights.
        """
        trainer, ahead = self._trainer, self._settle()
        if trainer.state.fn != TrainerFn.FITTING:
            return loops, self._layer_rng.state(), False
        noted = self._ended if self._interrupted else None  # perhaps while fetching a micro-batch
        if self._batches == 0:
            fit_loop = before_training(loops["fit_loop"], noted.loaders if noted else [])
            return {**loops, "fit_loop": fit_loop}, noted.generators if noted else self._layer_rng.state(), False
        if self._ended is None:
            return loops, self._layer_rng.state(), False
        if self._under_way is not None and self._weights_change:
            raise RuntimeError(
                f"step {trainer.global_step + 1} was stopped while it was changing the weights: their state is neither "
                "that before nor that after the step, so no checkpoint can be saved"
            )
        loaders, generators = self._ended.loaders, self._ended.generators
        if ahead:
            fit_loop = at_step_end(loops["fit_loop"], ahead, loaders, self._evaluated)
            return {**loops, "fit_loop": fit_loop}, generators, False
        if self._evaluation_follows():
            if trainer.training and not self._interrupted:
                loaders, generators = [], self._layer_rng.state()  # hooks may have drawn random numbers, too
            return {**loops, "fit_loop": before_evaluation(loops["fit_loop"], loaders)}, generators, True
        if self._interrupted:
            fit_loop = between_batches(loops["fit_loop"], loaders, self._evaluated, trainer.training)
            return {**loops, "fit_loop": fit_loop}, generators, False
        return loops, self._layer_rng.state(), False

    @property
    def _interrupted(self) -> bool:
        return self._trainer.state.status == TrainerStatus.INTERRUPTED

    def _evaluation_follows(self) -> bool:
        """Whether an evaluation follows the last step and has not started yet, or is not over."""
        trainer = self._trainer
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if trainer.validating and not trainer.sanity_checking:
            counts: Any = loop.val_loop.batch_progress.current
            over = counts.ready == counts.completed and loop.val_loop.batch_progress.is_last_batch
            return self._interrupted or not over
        counts = loop.batch_progress.current
        in_hook = trainer.training and counts.ready == counts.processed == counts.completed + 1
        return in_hook and fetcher is not None and trainer.enable_validation and loop._should_check_val_fx(fetcher)
