"""Logs the norms of the adapters of all layers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_pipelite.callbacks.support.control_decay import find_control, orthogonality, spectral_norm
from lightning_pipelite.callbacks.support.heat_map import heat_map
from lightning_pipelite.callbacks.support.low_rank import chunks, find_low_rank, gram_matrices
from lightning_pipelite.shared.over_ranks import LoggedSteps, gathered, summarize
from lightning_pipelite.shared.tf32 import full_precision

LAYERS_EVERY = 10
"""Every this many times that the averages are logged, the individual layers are logged too."""


class AdapterNorms(Callback):
    """Logs the norms of the adapters of all layers on all ranks, whenever Lightning logs a step.

    ``train/norms_{avg,min,max}``: for LoRA ‖s·B·A‖_F, for Control Adapters ‖W‖₂ = max |expm1(S)|.
    ``train/orthogonality_{avg,min,max}``: for Control Adapters ‖QᵀQ - I‖²_F. The first time and every tenth time
    after it, a TensorBoard logger also gets the norm of each layer: as a histogram ``train/norms_by_layer`` and as an
    image ``train/norms_map`` of layers (rows) by modules (columns).

    It works with PEFT's LoRA layers under any strategy that does not shard the adapters, and sees the weights as
    :class:`CompositeWeightDecay` leaves them. If a layer has several adapters, each counts separately, whether active
    or not. B·A is never formed. If there is no adapter, it warns once when training starts.

    Raises:
        ConfigurationError: From ``Trainer.fit``, if an adapter is more than a product B·A, or sharded.
    """

    _steps: LoggedSteps

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = LoggedSteps(trainer)
        mine = [torch.ones(()) for _ in (*find_low_rank(pl_module), *find_control(pl_module))]
        if not summarize({"adapters": mine}, trainer.strategy.root_device):
            rank_zero_warn(
                "AdapterNorms: the model has neither PEFT LoRA layers nor Control Adapters, so there are "
                "no norms to log."
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._steps.ended(trainer):
            return
        controls = find_control(pl_module)
        by_name = {pair.name: spectral_norm(pair) for pair in controls}
        with torch.no_grad(), full_precision():
            for chunk in chunks(find_low_rank(pl_module)):
                values = chunk.norms(*gram_matrices(*chunk.stack()))
                by_name.update(zip([pair.name for pair in chunk.pairs], values.unbind(), strict=True))
        groups = {"norms": [*by_name.values()], "orthogonality": [orthogonality(pair) for pair in controls]}
        for name, value in summarize(groups, trainer.strategy.root_device).items():
            pl_module.log(f"train/{name}", value, batch_size=1)
        if self._steps.every(LAYERS_EVERY):
            self._log_layers(trainer, by_name)

    def _log_layers(self, trainer: pl.Trainer, by_name: dict[str, Tensor]) -> None:
        """Log the norm of every layer. Collective."""
        numbers = torch.stack(list(by_name.values())).tolist() if by_name else []
        ranks = gathered(dict(zip(by_name, numbers, strict=True)))
        everywhere = {name: value for rank in ranks for name, value in rank.items()}
        if not (trainer.is_global_zero and everywhere):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                values = np.array(list(everywhere.values()))
                logger.experiment.add_histogram("train/norms_by_layer", values, trainer.global_step)
                picture = heat_map(everywhere)
                logger.experiment.add_image("train/norms_map", picture, trainer.global_step, dataformats="HWC")
