"""Training with several pieces of the model on each stage."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_pipelite import PipeLiteStrategy
from stage_jobs import Catchable, Module, Steps, collected, loader, trainer_for
from stage_models import WIDTH, Model, floats, linears


class Failing(nn.Module):
    """Fails, in the forward or the backward pass of the second step."""

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.linear, self.backward, self.seen = nn.Linear(WIDTH, WIDTH), backward, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        outputs: Tensor = self.linear(inputs)
        if self.seen > 2 and not self.backward:
            raise ValueError("enough")
        if self.seen > 2:
            outputs.register_hook(fail)
        return outputs


def fail(_: Tensor) -> None:
    raise ValueError("enough")


def drop_out(stages: int, replicas: int, virtual_stages: int) -> dict[str, Any]:
    """Return losses and weights with dropout in every layer, whose masks must be the same for every cut."""
    torch.manual_seed(3)
    layers = [nn.Sequential(layer, nn.Dropout(0.3)) for layer in linears(8)]
    model = Model(list(layers), floats(12), accumulate=4)
    steps, strategy = Steps(), Catchable(stages, virtual_stages=virtual_stages)
    trainer = trainer_for(
        strategy, stages * replicas, accumulate_grad_batches=4 // replicas, max_epochs=2, callbacks=[steps],
    )  # fmt: skip
    trainer.fit(Module(model), loader(model.batches, strategy))
    return {"losses": steps.losses, "weights": collected(strategy)}


def reported_failure(backward: bool) -> str:
    """Return the watchdog's report of a failing piece: layers 4 and 5 of eight, on the first of two stages."""
    told: list[str] = []

    class Telling(PipeLiteStrategy):
        def on_exception(self, exception: BaseException) -> None:
            watchdog = self._job._watchdog
            assert watchdog is not None
            told.append(str(watchdog.failure_of(exception)))

    torch.manual_seed(3)
    layers = linears(8)
    layers[4] = Failing(backward)
    model = Model(layers, floats(8), accumulate=2)
    strategy = Telling(2, virtual_stages=2)
    trainer = trainer_for(strategy, 2, accumulate_grad_batches=2, max_epochs=1)
    try:
        trainer.fit(Module(model), loader(model.batches, strategy))
    except (ValueError, RuntimeError):
        return told[0]
    return ""


def measured() -> tuple[dict[str, float], float]:
    """Return the times of one step by instruction, and its total."""
    torch.manual_seed(3)
    model = Model(linears(8), floats(8), accumulate=4)
    strategy = Catchable(2, virtual_stages=2)
    spent: list[float] = []

    class Measure(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            strategy.measure_stage_times = True
            spent.append(time.perf_counter())

    trainer = trainer_for(strategy, 2, accumulate_grad_batches=4, max_epochs=1, callbacks=[Measure()])
    trainer.fit(Module(model), loader(model.batches, strategy))
    assert strategy.instruction_times is not None
    return strategy.instruction_times, time.perf_counter() - spent[-1]
