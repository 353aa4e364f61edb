"""What of a run is saved and resumed, and when."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from lightning_pipelite import __version__
from lightning_pipelite.loop_state import after_last_batch, at_step_end, for_replicas
from lightning_pipelite.strategy.checkpoint.encoding import encode
from lightning_pipelite.strategy.checkpoint.store import CheckpointStore
from lightning_pipelite.strategy.randomness import LayerRandomness
from lightning_pipelite.strategy.resumed_options import (
    ResumedOptions,
    keep_callback_options,
    options_of,
    schedules_of,
)
from lightning_pipelite.strategy.topology import Topology


class Checkpointing:
    """Puts what Lightning saves of a run into a checkpoint that resumes exactly, and takes it back.

    Weights and optimizer change at the end of a step, while Lightning's loop counts micro-batches and takes some of the
    next step ahead. So the loaders and the generators are noted as each step ends, and a checkpoint is always that of
    the last step.

    Args:
        trainer: runs the loops.
        store: keeps the files.
        stage: this rank's stage.
        randomness: what its layers draw from.
        topology: of the job.
        on_gpu: whether copies to host memory are worth preparing.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        store: CheckpointStore,
        stage: nn.Module,
        randomness: LayerRandomness,
        topology: Topology,
        on_gpu: bool,
    ) -> None:
        self._trainer, self._store, self._stage = trainer, store, stage
        self._randomness, self._topology, self._on_gpu = randomness, topology, on_gpu
        self._random_states: dict[str, Any] | None = None  # of the checkpoint, until training starts
        self._step_ended: tuple[list[Any], dict[str, Any]] = [], {}  # the data loaders and generators at that time
        self._evaluated = False  # right after that step
        self._reserves = False  # host memory, before the first step that finds all of the optimizer's state
        self._versions = {name: version(name) for name in ("torch", "lightning", "deepspeed")}  # slow to find
        self._versions["lightning-pipelite"] = __version__
        self._made: dict[str, Any] = {}  # with what options the optimizer and its schedules were
        self._made_before: dict[str, Any] | None = None  # those of the training that is resumed
        self._changes: list[str] = []  # of the callbacks' options since then
        self._to_save: dict[str, bool] = {}  # after the evaluation that follows: whether without the optimizer

    # As the training goes

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Note the options; a stage's optimizer that has nothing to train may have others. Collective."""
        empty = [not group["params"] for group in optimizer.param_groups]
        everyones = self._store.share((options_of(optimizer), empty))
        groups = [
            next((options[index] for options, unused in everyones if not unused[index]), own)
            for index, own in enumerate(everyones[0][0])
        ]
        self._made = {"groups": groups, "schedules": schedules_of(self._trainer.lr_scheduler_configs)}

    def training_starts(self) -> None:
        """Called when the data loaders have been made, which drew from the generators.

        Raises:
            ConfigurationError: if there will be checkpoints, and something that one cannot hold: not hours later.
        """
        if self._random_states is not None:
            self._randomness.load_state(self._random_states)
            self._random_states = None
        self.step_ended()
        if self._trainer.checkpoint_callbacks and not self._trainer.fast_dev_run:  # type: ignore[attr-defined]
            state, _ = self._describe(self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False), ahead=0)
            encode(state, {})
            self._reserves = self._on_gpu

    def step_starts(self, optimizer: Optimizer) -> None:
        """Called before the gradients of a step take their memory."""
        if self._reserves and optimizer.state:
            self._reserves = False
            self._store.reserve(self._stage, optimizer)

    def step_ended(self) -> None:
        """Called when the last micro-batch of a step has been taken."""
        loader = self._trainer.fit_loop._combined_loader
        loaders = loader._state_dicts() if loader is not None and self._trainer.is_global_zero else []
        self._step_ended = loaders, self._randomness.state()
        self._evaluated = False

    def evaluation_ended(self, ahead: int) -> None:
        """Called after the callbacks.

        Args:
            ahead: how many micro-batches of the next step have been taken.
        """
        if self._trainer.state.fn != TrainerFn.FITTING or self._trainer.sanity_checking:
            return
        if not ahead:
            self.step_ended()
            self._evaluated = True
        to_save, self._to_save = self._to_save, {}
        for path, weights_only in to_save.items():
            self._trainer.save_checkpoint(path, weights_only)

    # Saving

    def save(self, checkpoint: dict[str, Any], path: Path, optimizer: Optimizer | None, ahead: int) -> None:
        """Copy everything to host memory; while training goes on, the files are written in the background.

        Args:
            checkpoint: what Lightning saves.
            path: the directory to write.
            optimizer: this rank's, if there is one.
            ahead: how many micro-batches of the next step have been taken.
        """
        if self._evaluation_follows():
            # Lightning does not make up for it when it resumes from a checkpoint before it.
            self._to_save[str(path)] = "optimizer_states" not in checkpoint
            return
        state, meta = self._describe(checkpoint, ahead)
        self._store.save(path, state, meta, self._stage, optimizer if "optimizer_states" in checkpoint else None)
        if self._trainer.state.status != "running":
            self._store.wait()

    def remove(self, path: Path) -> None:
        """Remove it as soon as what is being written is safely on the disk; if that fails, later. On rank 0."""
        self._store.remove(path, after_next=bool(self._to_save))

    def _evaluation_follows(self) -> bool:
        """Whether this is called in the last hook of a batch, before an evaluation."""
        trainer = self._trainer
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        counts: Any = loop.batch_progress.current
        in_hook = trainer.training and counts.ready == counts.processed == counts.completed + 1
        return in_hook and fetcher is not None and trainer.enable_validation and loop._should_check_val_fx(fetcher)

    def _describe(self, checkpoint: dict[str, Any], ahead: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What Lightning saves, with the random states; and what ``meta.json`` says."""
        state = {**checkpoint, "random_states": self._randomness.state()}
        if "optimizer_states" in checkpoint:
            state["made_with"] = self._made
        if ahead:  # in the middle of a step: the checkpoint is that of the last one
            loaders, state["random_states"] = self._step_ended
            fit_loop = at_step_end(checkpoint["loops"]["fit_loop"], ahead, loaders, self._evaluated)
            state["loops"] = {**checkpoint["loops"], "fit_loop": fit_loop}
        return state, {
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
            "stages": self._topology.stages,
            "replicas": self._topology.replicas,
            "micro_batches": self._trainer.accumulate_grad_batches,
            "identity": self._identity(),
            "hyper_parameters": encode(checkpoint.get("hyper_parameters", {}), {}, "hyper_parameters"),
            "versions": self._versions,
        }

    def _identity(self) -> dict[str, Any]:
        """What tells the module's model and what is trained of it from others, if the module can say."""
        describe = getattr(self._trainer.lightning_module, "checkpoint_identity", None)
        return describe() if callable(describe) else {}

    # Resuming

    def open(self, path: Path) -> dict[str, Any]:
        """Check a checkpoint and return what Lightning had saved, put right for the present job.

        Raises:
            ConfigurationError: if it is not whole, or of another model, adapter or global batch.
        """
        trainer = self._trainer
        state, meta = self._store.open(
            path, self._identity(), getattr(trainer.lightning_module, "checkpoint_may_differ", {})
        )
        self._random_states = state.pop("random_states")
        self._made_before = state.pop("made_with", None)
        if trainer.state.fn == TrainerFn.FITTING:
            self._changes = keep_callback_options(trainer.callbacks, state.get("callbacks", {}))  # type: ignore[attr-defined]
            after_last_batch(state["loops"]["fit_loop"], trainer.max_steps != -1)
            before = meta["replicas"], meta["micro_batches"]
            for_replicas(state["loops"], before, (self._topology.replicas, trainer.accumulate_grad_batches))
        return state

    def load_optimizer(self, optimizer: Optimizer, checkpoint: dict[str, Any]) -> None:
        """Load the optimizer's state, and put the states of the schedules in ``checkpoint`` right.

        Options that are others now than in the training that is resumed hold, and are told.

        Raises:
            ConfigurationError: if the checkpoint is of another optimizer; the same on every rank.
        """
        if self._made_before is None:
            self._trainer.print("the checkpoint does not tell with what options it was made: its optimizer's hold")
            self._store.load_optimizer(self._stage, optimizer)
            return
        resumed = ResumedOptions(self._made, self._made_before, self._changes)
        self._store.check_optimizer(optimizer)
        resumed.compare_groups(optimizer)
        configs = self._trainer.lr_scheduler_configs
        done = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
        counts = [done[config.interval] // config.frequency for config in configs]
        checkpoint["lr_schedulers"] = resumed.take_up(optimizer, configs, checkpoint["lr_schedulers"], counts)
        self._store.load_optimizer(self._stage, optimizer)
        for group, held in zip(optimizer.param_groups, resumed.overrides, strict=True):
            group.update(held)
        if resumed.changes:
            self._trainer.print(
                f"options that are others than the checkpoint's hold from here on: {'; '.join(resumed.changes)}; give "
                "the former values to go on with those"
            )
