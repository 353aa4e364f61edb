"""What a run saves and resumes, and when."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_pipelite import __version__
from lightning_pipelite.checkpoint.encoding import encode
from lightning_pipelite.checkpoint.store import CheckpointStore
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import AllowsAnother, IdentifiesItself
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy.last_step import LastStep
from lightning_pipelite.strategy.layer_rng import LayerRNG
from lightning_pipelite.strategy.made_options import named_options, options_of, schedules_of
from lightning_pipelite.strategy.outside_layers import load_outside_layers, outside_layers
from lightning_pipelite.strategy.resumption import Resumption
from lightning_pipelite.strategy.same_options import comparable, require_same, trainer_options

_LIGHTNINGS_OWN = {
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
    "lr_schedulers", "hyper_parameters", "hparams_name", "datamodule_hyper_parameters", "datamodule_hparams_name",
}  # fmt: skip

_TYPES = {"hparams_type", "datamodule_hparams_type"}
"""Keys of the hyper-parameter containers' classes; the containers are stored as plain dicts."""


class Checkpointing:
    """Turns what Lightning saves of a run into a checkpoint that resumes exactly, and restores it.

    Weights and optimizer change at the end of a step, whereas Lightning's loop counts micro-batches and fetches some of
    the next step's in advance. The states of the loaders and generators are therefore recorded as each step ends, and a
    checkpoint always describes the end of the last step.

    Args:
        trainer: Runs the loops.
        store: Keeps the files.
        stage: This rank's stage.
        layer_rng: The random number generators of its layers.
        topology: The job's topology.
        on_gpu: Whether the stage is on a GPU, so that host memory for copies is worth reserving.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        store: CheckpointStore,
        stage: nn.Module,
        layer_rng: LayerRNG,
        topology: Topology,
        on_gpu: bool,
    ) -> None:
        self._trainer, self._store, self._stage = trainer, store, stage
        self._layer_rng, self._topology, self._on_gpu = layer_rng, topology, on_gpu
        self._resumption: Resumption | None = None  # from the opening of a checkpoint until training starts
        self.last_step = LastStep(trainer, layer_rng)
        self._reserves = False  # whether host memory is still to be reserved, once the optimizer has its state
        self._versions = _versions()  # looked up now, as that is too slow to do during training
        self._made: dict[str, Any] = {}  # the options of the optimizer and its schedules as they were made

    # During training

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Record the options of the optimizer and its schedules. Collective.

        Those of a group that has no parameters on this stage may differ.

        Raises:
            ConfigurationError: On every rank, if the ranks were given different options.
        """
        empty = [not group["params"] for group in optimizer.param_groups]
        schedules = schedules_of(self._trainer.lr_scheduler_configs)
        options = [comparable(group) for group in options_of(optimizer)]
        named = comparable({**named_options(options, empty, schedules), **trainer_options(self._trainer)})
        shared = self._store.share((options, empty, named))
        require_same([named for *_, named in shared])
        everyones = [(options, unused) for options, unused, _ in shared]
        groups = [
            next((options[index] for options, unused in everyones if not unused[index]), own)
            for index, own in enumerate(everyones[0][0])
        ]
        self._made = {"groups": groups, "schedules": schedules}

    def training_starts(self) -> None:
        """Begin, once the data loaders have been created, since that draws from the generators.

        Raises:
            ConfigurationError: If checkpoints will be saved and one cannot hold something: now, not hours later.
        """
        resumption, self._resumption = self._resumption, None
        if resumption is not None:
            resumption.training_starts()
        self.last_step.training_starts()
        if self._trainer.checkpoint_callbacks and not self._trainer.fast_dev_run:  # type: ignore[attr-defined]
            encode(self._rehearsed(), {})
            self._reserves = self._on_gpu

    def training_ends(self) -> None:
        """End, after everything else; Lightning does not even start a training that has reached its last epoch."""
        if self._resumption is not None:
            self._resumption.training_ends()

    def _rehearsed(self) -> dict[str, Any]:
        """Return what Lightning will save, except for what ``on_save_checkpoint`` adds.

        That hook is not called, because users save files of their own in it.
        """
        trainer = self._trainer
        parts: list[Any] = [trainer.lightning_module, trainer.datamodule]  # type: ignore[attr-defined]
        return {
            "callbacks": _call_callbacks_state_dict(trainer),
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "loops": trainer.fit_loop.state_dict(),
            "datamodule": parts[1].state_dict() if parts[1] is not None else {},
            **{part.CHECKPOINT_HYPER_PARAMS_KEY: dict(part.hparams) for part in parts if part is not None},
        }

    def step_starts(self, optimizer: Optimizer) -> None:
        """Prepare for a step, before its gradients take up memory."""
        if self._reserves and optimizer.state:
            self._reserves = False
            self._store.reserve(self._stage, optimizer)

    # Saving

    def outside_layers(self) -> dict[str, Any]:
        """Return by name the tensors that the module holds outside its layers; all else is saved by stage."""
        return {**outside_layers(self._trainer.lightning_module, self._stage)}

    def save(self, checkpoint: dict[str, Any], path: Path, optimizer: Optimizer | None) -> None:
        """Copy everything to host memory; while training continues, the files are written in the background.

        Args:
            checkpoint: What Lightning saves.
            path: The directory to write.
            optimizer: This rank's optimizer, if there is one.

        Raises:
            OSError: If training does not continue and the files cannot be written.
            RuntimeError: If a step was stopped while it was changing the weights.
        """
        state, meta = self._describe(self._holdable(checkpoint, path))
        self._store.save(path, state, meta, self._stage, optimizer if "optimizer_states" in checkpoint else None)
        # In on_fit_end and teardown the Trainer's status is still RUNNING.
        if self._store.closed or self._trainer.state.status != TrainerStatus.RUNNING:
            self._store.wait()
            if failure := self._store.failure:
                raise OSError(f"the checkpoint {path} could not be written: {failure}")

    def _holdable(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        """Drop what ``on_save_checkpoint`` added and a checkpoint cannot hold; all else was checked beforehand."""
        kept = {key: value for key, value in checkpoint.items() if key not in _TYPES}
        for key in kept.keys() - _LIGHTNINGS_OWN if self._trainer.is_global_zero else ():
            try:
                encode({key: checkpoint[key]}, {})
            except ConfigurationError as error:
                rank_zero_warn(f"{path} is written without {key!r}, which on_save_checkpoint added: {error}")
                del kept[key]
        return kept

    def remove(self, path: Path) -> None:
        """Remove a checkpoint once pending writes are safely on disk; later, if they fail. On rank 0."""
        self._store.remove(path)

    def _describe(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what Lightning saves, with the random states added, and the contents of ``meta.json``."""
        loops, generators, evaluation_follows = self.last_step.state(checkpoint["loops"])
        if self._resumption is not None:
            generators = self._resumption.random_states  # not loaded yet
        state = {**checkpoint, "loops": loops, "random_states": generators, "evaluation_follows": evaluation_follows}
        if "optimizer_states" in checkpoint:
            state["made_with"] = self._made
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
        """Return what identifies the module's model and the trained part of it, if the module provides that."""
        module = self._trainer.lightning_module
        return module.checkpoint_identity() if isinstance(module, IdentifiesItself) else {}

    # Resuming

    def open(self, path: Path) -> dict[str, Any]:
        """Check a checkpoint and return what Lightning had saved, adjusted to the present job.

        Raises:
            ConfigurationError: If it is incomplete, or of another model, adapter or global batch.
        """
        module = self._trainer.lightning_module
        may_differ = module.checkpoint_may_differ if isinstance(module, AllowsAnother) else {}
        state, meta = self._store.open(path, self._identity(), may_differ)
        self._resumption = Resumption(self._trainer, self._layer_rng, self._topology, path, state, meta)
        return state

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Load the stage, and what the module holds outside its layers.

        Args:
            checkpoint: What Lightning had saved.
            strict: Whether the checkpoint must hold all of it, and nothing else.

        Raises:
            ConfigurationError: If the checkpoint is of another module; the same on every rank.
        """
        self._store.load_parameters(self._stage, strict)
        saved = checkpoint.get("state_dict", {})
        load_outside_layers(self._trainer.lightning_module, self._stage, saved, strict)

    def load_optimizer(self, optimizer: Optimizer, checkpoint: dict[str, Any]) -> None:
        """Load the optimizer's state, and adjust the states of the schedules in ``checkpoint``.

        Raises:
            ConfigurationError: If the checkpoint is of another optimizer; the same on every rank.
        """
        assert self._resumption is not None
        self._store.check_optimizer(optimizer)
        held = self._resumption.take_up_options(optimizer, checkpoint, self._made)
        self._store.load_optimizer(self._stage, optimizer)
        for group, options in zip(optimizer.param_groups, held, strict=True):
            group.update(options)


@cache
def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "lightning", "deepspeed")}
    return {**found, "lightning-pipelite": __version__}
