"""The plan in a training: it decides what it was left to, refuses what does not fit, and is held against what is so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_pipelite.data import PackedDataModule
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.planning.before_training import Job, PlannedTraining, compared, device_memory, plan_training
from lightning_pipelite.planning.device_speed import measured_speed, relative
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.shared.over_ranks import gathered
from lightning_pipelite.shared.own_callback import OwnCallback
from lightning_pipelite.strategy import PipeLiteStrategy
from lightning_pipelite.strategy.layers import is_built

SETTLED = 2  # steps, by when all has been allocated once


class MemoryPlan(OwnCallback):
    """Plans before weights are loaded, on rank 0 for all; after two steps prints what was planned and what is so.

    It plans for a PackedDataModule, whose micro-batches are known, and where there is something to decide: on GPUs, or
    with ``partition_method`` auto.

    Args:
        layers: That are to be trained; their ``costs`` are set, and if it is to be chosen ``activation_memory``. Of a
            module whose stage is there already, from an earlier run, nothing is planned anew: it stays as it is.
        loss: On what the last stage returns.
        make_optimizer: Makes the optimizer of some parameters.
        choose: Whether to choose what is kept of activations.
        refuse: Whether to refuse a training that does not fit its GPUs.
    """

    def __init__(
        self,
        layers: CausalLMLayers,
        loss: Callable[[Any, Any], Any],
        make_optimizer: Callable[..., torch.optim.Optimizer],
        *,
        choose: bool,
        refuse: bool,
    ) -> None:
        self._layers, self._loss, self._make_optimizer = layers, loss, make_optimizer
        self._choose, self._refuse = choose, refuse
        self._peaks: Sequence[int] = ()  # that are to be compared
        self._first_step = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plan, and go by it. Collective.

        Raises:
            ConfigurationError: If a stage does not fit its GPU; it says what would. Or if the layers are to be cut by
                a plan that cannot be made.
        """
        self._peaks = ()
        strategy, data = trainer.strategy, trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(strategy, PipeLiteStrategy) or not isinstance(data, PackedDataModule) or is_built(pl_module):
            return
        cuts, fits = strategy.partition_method == "auto", stage == "fit" and strategy.root_device.type == "cuda"
        if not (cuts or fits):
            return
        memory = gathered(device_memory(strategy.root_device))  # to validate, too: what is cut then is fitted later
        speeds = tuple(strategy.speeds or ())
        if cuts and not speeds and strategy.pipeline_stages > 1 and strategy.root_device.type == "cuda":
            speeds = relative(gathered(measured_speed(strategy.root_device)))
        job = Job(
            stages=strategy.pipeline_stages,
            method=strategy.partition_method,
            micro_batches=trainer.accumulate_grad_batches,
            sequence_len=data.sequence_len,
            devices=Devices(
                strategy.world_size,
                tuple(size for size in memory if size) if all(memory) else (),
                speeds,
                strategy.use_column_major_topology,
            ),
            virtual_stages=strategy.virtual_stages,
        )
        made: PlannedTraining | str | None = None
        if strategy.global_rank == 0:
            made = plan_training(self._layers, self._loss, self._make_optimizer, job, self._choose)
        planned = strategy.broadcast(made)
        if isinstance(planned, str):
            if cuts:
                raise ConfigurationError(
                    f"partition_method is auto, but what the layers cost could not be found out ({planned}); set it to "
                    "uniform, parameters or type:REGEX."
                )
            rank_zero_warn(f"the memory that training takes could not be planned ({planned}).")
            return
        assert planned is not None
        if fits and self._refuse and planned.refusal:
            raise ConfigurationError(planned.refusal)
        if planned.advice:
            rank_zero_warn(planned.advice)
        if self._choose:
            self._layers.activation_memory = planned.activation_memory  # type: ignore[assignment]
        self._layers.costs = planned.costs
        self._peaks = planned.peaks if fits else ()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step
        if self._peaks:  # what loading and quantising took is not what was planned
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._peaks and trainer.global_step >= self._first_step + SETTLED:
            strategy = trainer.strategy
            assert isinstance(strategy, PipeLiteStrategy)
            mine = strategy.stage_id, torch.cuda.max_memory_allocated(strategy.root_device)
            most = dict(sorted(gathered(mine)))  # of the ranks with the same stage, which take the same, the most
            trainer.print(compared(self._peaks, [*most.values()]))
            self._peaks = ()
