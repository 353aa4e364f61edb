"""What of a run is saved and resumed, and when."""

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
"""The classes of the hyper-parameters' containers, which are stored as dicts."""


class Checkpointing:
    """Puts what Lightning saves of a run into a checkpoint that resumes exactly, and takes it back.

    Weights and optimizer change at the end of a step, while Lightning's loop counts micro-batches and takes some of the
    next step ahead. So the loaders and the generators are noted as each step ends, and a checkpoint is always that of
    the last step.

    Args:
        trainer: Runs the loops.
        store: Keeps the files.
        stage: This rank's stage.
        layer_rng: What its layers draw from.
        topology: Of the job.
        on_gpu: Whether copies to host memory are worth preparing.
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
        self._resumption: Resumption | None = None  # until training starts
        self.last_step = LastStep(trainer, layer_rng)
        self._reserves = False  # host memory, before the first step that finds all of the optimizer's state
        self._versions = _versions()  # before the first step: they are slow to find
        self._made: dict[str, Any] = {}  # with what options the optimizer and its schedules were

    # As the training goes

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Note the options; a stage's optimizer that has nothing to train may have others. Collective.

        Raises:
            ConfigurationError: On every rank, if the options that the ranks were given are not the same.
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
        """Begin, once the data loaders have been made, which drew from the generators.

        Raises:
            ConfigurationError: If there will be checkpoints, and something that one cannot hold: not hours later.
        """
        resumption, self._resumption = self._resumption, None
        if resumption is not None:
            resumption.training_starts()
        self.last_step.training_starts()
        if self._trainer.checkpoint_callbacks and not self._trainer.fast_dev_run:  # type: ignore[attr-defined]
            encode(self._rehearsed(), {})
            self._reserves = self._on_gpu

    def training_ends(self) -> None:
        """End, after everything else; Lightning does not even begin what has reached its last epoch."""
        if self._resumption is not None:
            self._resumption.training_ends()

    def _rehearsed(self) -> dict[str, Any]:
        """Return what Lightning will save, but for what ``on_save_checkpoint`` adds.

        Users save files of their own there.
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
        """Prepare a step, before its gradients take their memory."""
        if self._reserves and optimizer.state:
            self._reserves = False
            self._store.reserve(self._stage, optimizer)

    # Saving

    def outside_layers(self) -> dict[str, Any]:
        """Return what the module has beside its layers, by name; all else is saved by stage."""
        return {**outside_layers(self._trainer.lightning_module, self._stage)}

    def save(self, checkpoint: dict[str, Any], path: Path, optimizer: Optimizer | None) -> None:
        """Copy everything to host memory; while training goes on, the files are written in the background.

        Args:
            checkpoint: What Lightning saves.
            path: The directory to write.
            optimizer: This rank's, if there is one.

        Raises:
            OSError: If training does not go on, and the files cannot be written.
            RuntimeError: If a step was stopped while it changed the weights.
        """
        state, meta = self._describe(self._holdable(checkpoint, path))
        self._store.save(path, state, meta, self._stage, optimizer if "optimizer_states" in checkpoint else None)
        # In on_fit_end and teardown the Trainer still says that it runs.
        if self._store.closed or self._trainer.state.status != TrainerStatus.RUNNING:
            self._store.wait()
            if failure := self._store.failure:
                raise OSError(f"the checkpoint {path} could not be written: {failure}")

    def _holdable(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        """Leave out what ``on_save_checkpoint`` has added and no checkpoint can hold; all else was seen beforehand."""
        kept = {key: value for key, value in checkpoint.items() if key not in _TYPES}
        for key in kept.keys() - _LIGHTNINGS_OWN if self._trainer.is_global_zero else ():
            try:
                encode({key: checkpoint[key]}, {})
            except ConfigurationError as error:
                rank_zero_warn(f"{path} is written without {key!r}, which on_save_checkpoint has added: {error}")
                del kept[key]
        return kept

    def remove(self, path: Path) -> None:
        """Remove it as soon as what is being written is safely on the disk; if that fails, later. On rank 0."""
        self._store.remove(path)

    def _describe(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what Lightning saves, with the random states; and what ``meta.json`` says."""
        loops, generators, evaluation_follows = self.last_step.state(checkpoint["loops"])
        if self._resumption is not None:
            generators = self._resumption.random_states  # which are not loaded yet
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
        """Return what tells the module's model and what is trained of it from others, if the module can say."""
        module = self._trainer.lightning_module
        return module.checkpoint_identity() if isinstance(module, IdentifiesItself) else {}

    # Resuming

    def open(self, path: Path) -> dict[str, Any]:
        """Check a checkpoint and return what Lightning had saved, put right for the present job.

        Raises:
            ConfigurationError: If it is not whole, or of another model, adapter or global batch.
        """
        module = self._trainer.lightning_module
        may_differ = module.checkpoint_may_differ if isinstance(module, AllowsAnother) else {}
        state, meta = self._store.open(path, self._identity(), may_differ)
        self._resumption = Resumption(self._trainer, self._layer_rng, self._topology, path, state, meta)
        return state

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Load the stage, and what the module has beside its layers.

        Args:
            checkpoint: What Lightning had saved.
            strict: Whether the checkpoint has to have all of it, and nothing else.

        Raises:
            ConfigurationError: If the checkpoint is of another module; the same on every rank.
        """
        self._store.load_parameters(self._stage, strict)
        saved = checkpoint.get("state_dict", {})
        load_outside_layers(self._trainer.lightning_module, self._stage, saved, strict)

    def load_optimizer(self, optimizer: Optimizer, checkpoint: dict[str, Any]) -> None:
        """Load the optimizer's state, and put the states of the schedules in ``checkpoint`` right.

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
