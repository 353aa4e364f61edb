"""A run of the Trainer on one rank, from its setup to its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_pipelite.checkpoint.promised import see_promises
from lightning_pipelite.checkpoint.store import CheckpointStore
from lightning_pipelite.shared.protocol import Loss, PipelineLayers, names_of_sums
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy.agreement import Agreement
from lightning_pipelite.strategy.checkpointing import Checkpointing
from lightning_pipelite.strategy.deepspeed_compat import forget_engine
from lightning_pipelite.strategy.evaluation import PipelineEvaluation
from lightning_pipelite.strategy.layer_rng import LayerRNG
from lightning_pipelite.strategy.layers import (
    LooseParts,
    build_stage,
    hand_out_layers,
    keeps_stage,
    release_stage,
)
from lightning_pipelite.strategy.partition import spans_of
from lightning_pipelite.strategy.pipeline import Pipeline
from lightning_pipelite.strategy.process_groups import JobGroups
from lightning_pipelite.strategy.sigterm import SigtermNotice
from lightning_pipelite.strategy.training import PipelineTraining

if TYPE_CHECKING:
    from lightning_pipelite.strategy.engine import PipeLiteEngine


class PipelineRun:
    """Process groups, stage, engine, and what works with them; created in this order, torn down in reverse.

    Constructing it is collective. ``end`` undoes what each part leaves behind, also if the construction fails halfway.
    The stage, the store and the checkpointing remain: what was trained can still be saved afterwards.

    Args:
        trainer: Runs the loops.
        handed: The module's layers and loss, if it has already handed them out.
        topology: The topology of the job.
        cut: Cuts the layers into stages, or into their pieces.
        timeout: How long a rank may make no progress.
        progress: Called before everything that ranks do together, with its name, whether it may wait for other ranks,
            and the piece of the stage that it concerns, if there are several.
        end: Receives what is to be undone at the end of the run.

    Attributes:
        stage: This rank's stage.
        store: Keeps the checkpoints' files.
        checkpointing: Saves and resumes the run.
        engine: DeepSpeed's engine; until the end of the run.
        training: Runs the steps; until the end of the run.
        evaluation: Runs the evaluation sets; until the end of the run.
    """

    engine: PipeLiteEngine
    training: PipelineTraining
    evaluation: PipelineEvaluation

    def __init__(
        self,
        trainer: pl.Trainer,
        handed: tuple[PipelineLayers, Loss] | None,
        *,
        topology: Topology,
        cut: Callable[[PipelineLayers], list[int]],
        timeout: timedelta,
        progress: Callable[[str, bool, str], None],
        end: contextlib.ExitStack,
    ) -> None:
        # These can be imported only once the device is known.
        from lightning_pipelite.strategy.engine import PipeLiteEngine
        from lightning_pipelite.strategy.interleaved_engine import InterleavedEngine

        module, rank, device = trainer.lightning_module, trainer.global_rank, trainer.strategy.root_device
        self._trainer, self._stages = trainer, topology.stages
        groups = JobGroups()
        end.callback(groups.destroy)
        # As for the default group, so that the watchdog reports first: torch gives other groups its own default.
        group_timeout = timeout + timedelta(seconds=60)
        with groups.noted():
            agreement = Agreement(topology, rank, group_timeout)
        end.callback(agreement.close)
        self.sigterm = SigtermNotice(trainer, agreement)
        end.callback(self.sigterm.release)
        layers, loss = handed or hand_out_layers(module)
        bounds = cut(layers)
        stage_id = topology.stage_of(rank)
        spans = spans_of(bounds, topology.stages, stage_id)
        self.stage: nn.Module = build_stage(module, layers, spans, bounds[-1], device)
        end.callback(self._release_stage)
        loose_parts = LooseParts(module, self.stage)
        if isinstance(loss, nn.Module):
            loss.to(device)
        layer_rng = LayerRNG(trainer.strategy, device, self.stage)
        end.callback(layer_rng.release)
        end.callback(self._forget_engine)
        with groups.noted():
            self.engine = (InterleavedEngine if len(spans) > 1 else PipeLiteEngine)(
                self.stage,
                stage_id,
                topology.stages,
                topology.column_major,
                loss,
                progress=progress,
                layer_rng=layer_rng,
                timeout=group_timeout,
                add_up=agreement.add_up,
            )
            self.store = CheckpointStore(topology, rank, device, timeout)
        end.callback(see_promises(trainer.callbacks, self.store.promised))  # type: ignore[attr-defined]
        end.callback(self.store.close)
        on_gpu = device.type == "cuda"
        self.checkpointing = Checkpointing(trainer, self.store, self.stage, layer_rng, topology, on_gpu)
        end.callback(self.checkpointing.training_ends)
        pipeline = Pipeline(trainer, self.engine, agreement, topology, loose_parts)
        self.training = PipelineTraining(pipeline, self.stage, self.checkpointing, names_of_sums(loss))
        self.evaluation = PipelineEvaluation(pipeline)

    def _forget_engine(self) -> None:
        engine = self.__dict__.pop("engine", None)
        for name in ("training", "evaluation"):
            self.__dict__.pop(name, None)
        forget_engine(engine)

    def _release_stage(self) -> None:
        trainer, module = self._trainer, self._trainer.lightning_module
        if release_stage(module):
            # As Lightning's strategies do.
            _optimizers_to_device(trainer.optimizers, torch.device("cpu"))
            module.cpu()
        elif trainer.state.fn == TrainerFn.FITTING and not keeps_stage(module):
            rank_zero_info(
                f"Each process now holds only the trained layers of its own stage, one of {self._stages}: the other "
                f"layers of this {type(module).__name__} are on the meta device, without values."
            )
