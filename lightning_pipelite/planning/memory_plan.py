"""The plan in training: makes the choices left to it, refuses what does not fit, and is compared with measurements."""

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

SETTLED = 2  # steps after which everything has been allocated once


class MemoryPlan(OwnCallback):
    """Plans on rank 0 for all ranks before weights are loaded; after two steps prints planned and measured memory.

    It plans only for a PackedDataModule, whose micro-batches are known, and only if there is something to decide: on
    GPUs, or with ``partition_method`` auto.

    Args:
        layers: The layers to train. Sets their ``costs``, and their ``activation_memory`` if it is to be chosen. If the
            module's stage was already built in an earlier run, nothing is planned and it stays as it is.
        loss: The loss on the last stage's output.
        make_optimizer: Creates the optimizer of the given parameters.
        choose: Whether to choose the activation memory policy.
        refuse: Whether to refuse training that does not fit its GPUs.
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
        self._peaks: Sequence[int] = ()  # to compare with measured ones
        self._first_step = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plan, and apply the plan. Collective.

        Raises:
            ConfigurationError: If a stage does not fit its GPU (the message says what would), or if the layers are to
                be cut by a plan that cannot be made.
        """
        self._peaks = ()
        strategy, data = trainer.strategy, trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(strategy, PipeLiteStrategy) or not isinstance(data, PackedDataModule) or is_built(pl_module):
            return
        cuts, fits = strategy.partition_method == "auto", stage == "fit" and strategy.root_device.type == "cuda"
        if not (cuts or fits):
            return
        memory = gathered(device_memory(strategy.root_device))  # also to validate: a later fit keeps the split
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
                    f"partition_method is auto, but the costs of the layers could not be determined ({planned}); set "
                    "it to uniform, parameters or type:REGEX."
                )
            rank_zero_warn(f"the memory use of training could not be planned ({planned}).")
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
        if self._peaks:  # the plan excludes loading and quantising
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._peaks and trainer.global_step >= self._first_step + SETTLED:
            strategy = trainer.strategy
            assert isinstance(strategy, PipeLiteStrategy)
            mine = strategy.stage_id, torch.cuda.max_memory_allocated(strategy.root_device)
            most = dict(sorted(gathered(mine)))  # the largest of each stage's ranks, which take the same
            trainer.print(compared(self._peaks, [*most.values()]))
            self._peaks = ()
