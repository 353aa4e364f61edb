"""A run that resumes from a checkpoint, until it has started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.optim import Optimizer

from lightning_pipelite.checkpoint.loop_state import after_last_batch, for_replicas
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy.known_callbacks import micro_batches_in
from lightning_pipelite.strategy.layer_rng import LayerRNG
from lightning_pipelite.strategy.resumed_options import ResumedOptions, keep_callback_options


class Resumption:
    """A run that resumes from a checkpoint; adapts Lightning's part of the state to the current job.

    Args:
        trainer: Runs the loops.
        layer_rng: The layers' source of random numbers.
        topology: The topology of the job.
        path: The checkpoint.
        state: The state that Lightning saved, with this package's entries, which are removed from it.
        meta: The content of the checkpoint's ``meta.json``.

    Attributes:
        random_states: The checkpoint's, loaded once training starts.

    Raises:
        ConfigurationError: If a training cannot resume from it.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        layer_rng: LayerRNG,
        topology: Topology,
        path: Path,
        state: dict[str, Any],
        meta: dict[str, Any],
    ) -> None:
        self._trainer, self._layer_rng = trainer, layer_rng
        self.random_states: dict[str, Any] = state.pop("random_states")
        self._made_before: dict[str, Any] | None = state.pop("made_with", None)
        self._evaluation_follows: bool = state.pop("evaluation_follows", False)
        self._from = f"{path} (step {meta['step']})"
        self._trains = trainer.state.fn == TrainerFn.FITTING
        if not self._trains:
            return
        if "optimizer_states" not in state:
            raise ConfigurationError(
                f"ckpt_path: {path} was saved with save_weights_only, so training cannot resume from it; name another "
                "checkpoint."
            )
        trainer.print(f"resuming from {self._from}")
        self._changes = keep_callback_options(trainer.callbacks, state.get("callbacks", {}))  # type: ignore[attr-defined]
        after_last_batch(state["loops"]["fit_loop"], trainer.max_steps != -1)
        before = meta["replicas"], meta["micro_batches"]
        for_replicas(state["loops"], before, (topology.replicas, micro_batches_in(trainer, meta["epoch"])))

    def take_up_options(
        self, optimizer: Optimizer, checkpoint: dict[str, Any], made: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Adapt the states of the schedules in ``checkpoint`` to the options given now.

        Options that differ from those of the resumed training take effect, and are reported.

        Args:
            optimizer: The optimizer as created, with as many groups as the checkpoint.
            checkpoint: What Lightning had saved.
            made: The options with which the optimizer and its schedules were created now.

        Returns:
            For each group of the optimizer, the options that replace the checkpoint's.
        """
        trainer = self._trainer
        if self._made_before is None:
            trainer.print("the checkpoint does not record its options: those in its optimizer state are kept")
            return [{} for _ in optimizer.param_groups]
        resumed = ResumedOptions(made, self._made_before, self._changes)
        resumed.compare_groups(optimizer)
        configs = trainer.lr_scheduler_configs
        done = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
        counts = [done[config.interval] // config.frequency for config in configs]
        checkpoint["lr_schedulers"] = resumed.take_up(optimizer, configs, checkpoint["lr_schedulers"], counts)
        if resumed.changes:
            trainer.print(
                f"options that differ from the checkpoint's take effect now: {'; '.join(resumed.changes)}; restore the "
                "former values to undo this"
            )
        return resumed.overrides

    def training_starts(self) -> None:
        """Load the random states, after the creation of the data loaders has drawn from the generators."""
        self._layer_rng.load_state(self.random_states)
        if self._trains and self._trainer.fit_loop.done:
            self._tell_that_it_is_complete()
        if self._evaluation_follows:
            self._expect_evaluation()

    def training_ends(self) -> None:
        """Report a training that is complete: Lightning does not even start one at its last epoch."""
        if self._trains and self._trainer.state.status != TrainerStatus.INTERRUPTED:
            self._tell_that_it_is_complete()

    def _tell_that_it_is_complete(self) -> None:
        limits = {"max_steps": self._trainer.max_steps, "max_epochs": self._trainer.max_epochs}
        given = " and ".join(f"{name} {value}" for name, value in limits.items() if value not in (None, -1))
        self._trainer.print(f"training is already complete: {self._from}, with {given}; raise the limit to continue")

    def _expect_evaluation(self) -> None:
        """Make Lightning's loop run the pending evaluation, even if a callback decides when to evaluate."""
        trainer = self._trainer
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if fetcher is not None and trainer.val_check_batch is not None and not loop._should_check_val_fx(fetcher):
            by_epoch = trainer.check_val_every_n_epoch is not None
            trainer.val_check_batch = (loop.batch_idx if by_epoch else loop.total_batch_idx) + 1
