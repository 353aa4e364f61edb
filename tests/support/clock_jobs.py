"""A pipeline whose second stage is slow."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_pipelite import PipeLiteStrategy
from stage_jobs import Module, loader, trainer_for
from stage_models import Lambda, Model, floats, linears

NAP, MICRO_BATCHES = 0.03, 4


def nap(inputs: Tensor) -> Tensor:
    time.sleep(NAP)
    return inputs


class Watch(L.Callback):
    """Measures the second of three steps."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.strategy.measure_stage_times = trainer.global_step == 1

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.seen.append((trainer.strategy.stage_times, trainer.strategy.instruction_times))


def measured() -> list[Any]:
    """Return what the strategy reports after each step."""
    torch.manual_seed(3)
    layers, batches = linears(4), floats(3 * MICRO_BATCHES)
    layers.insert(3, Lambda(nap))
    watch, strategy = Watch(), PipeLiteStrategy(2)
    trainer = trainer_for(
        strategy, 2, accumulate_grad_batches=MICRO_BATCHES, max_steps=3, max_epochs=-1, callbacks=[watch]
    )
    trainer.fit(Module(Model(layers, batches)), loader(batches, strategy))
    return watch.seen
