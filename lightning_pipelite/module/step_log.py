"""What is logged of each step besides the strategy's losses and norms: its number, learning rate and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.module.throughput import Speed, speed_of
from lightning_pipelite.shared.async_scalar import on_host
from lightning_pipelite.shared.own_callback import OwnCallback
from lightning_pipelite.strategy import PipeLiteStrategy


class StepLog(OwnCallback):
    """Logs ``train/lr``, ``train/tokens_per_s`` and ``train/mfu``, and numbers steps as the terminal does.

    Args:
        layers: The layers that are trained.
        parameters: Returns this rank's parameters, by the names that the model itself gives them, once a stage exists.
        positions: Returns the next batch's position_ids as they were on the host; None if they came on a GPU.
    """

    def __init__(
        self,
        layers: CausalLMLayers,
        parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]],
        positions: Callable[[], Tensor | None],
    ) -> None:
        self._layers, self._own_parameters, self._positions = layers, parameters, positions
        self._speed = Speed()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(trainer.strategy, PipeLiteStrategy)
        self._speed = speed_of(self._layers, self._own_parameters(), trainer.strategy)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        (_, position_ids, *_), _ = batch
        before = self._positions()
        self._speed.begin(position_ids if before is None else before)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # All of it here, while the GPU still runs the backward pass: after the step, it would wait for the host.
        _log_place(trainer, pl_module, trainer.global_step + 1)
        pl_module.log("train/lr", on_host(float(optimizer.param_groups[0]["lr"])))
        for name, value in self._speed.end().items():
            pl_module.log(name, on_host(value), prog_bar=name == "train/tokens_per_s")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause(trainer)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            _log_place(trainer, pl_module, trainer.global_step)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause(trainer)

    def _pause(self, trainer: pl.Trainer) -> None:
        """Stop the clock until the next micro-batch: an evaluation or an epoch's end follows."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the step's backward pass may still be running
        self._speed.pause()


def _log_place(trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
    """Make loggers count steps as the terminal does; Lightning's own count is one less, also in an evaluation.

    Given the step, Lightning leaves out the epoch, which is therefore logged too.
    """
    for name, value in (("step", step), ("epoch", trainer.current_epoch)):
        if trainer.training:
            module.log(name, on_host(float(value)))
        else:
            module.log(name, float(value), batch_size=1, reduce_fx="max", sync_dist=True)
