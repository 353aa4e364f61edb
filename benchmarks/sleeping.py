"""A model whose layers sleep instead of computing, so that ranks that share few cores run at full speed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tests_support  # noqa: F401
from handed_layers import HandedLayers
from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.shared.protocol import LayerCosts

WIDTH = 16


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Sleeping(nn.Module):
    """A layer that sleeps for ``seconds`` in forward, and twice that in backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(WIDTH, WIDTH), seconds

    def forward(self, inputs: Tensor) -> Tensor:
        slept: Tensor = _Sleep.apply(torch.tanh(self.linear(inputs)), self.seconds)
        return slept


class Layers:
    """Sleeping layers that report their costs.

    Args:
        seconds: Time of a layer's forward pass on a device of speed 1.
        layers: Number of layers.
        micro_batches: Number of micro-batches a step.
        speed: Speed of this rank.
    """

    def __init__(self, seconds: float, layers: int, micro_batches: int, speed: float) -> None:
        self.names = ["Sleeping"] * layers
        self._seconds, self._micro_batches, self._speed = seconds, micro_batches, speed

    def parameter_counts(self) -> list[int]:
        return [WIDTH * WIDTH + WIDTH] * len(self.names)

    def layer_costs(self) -> LayerCosts:
        zeros = [0] * len(self.names)
        return LayerCosts([3 * self._seconds] * len(self.names), zeros, zeros, self._micro_batches)

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        def layer(number: int) -> nn.Module:
            torch.manual_seed(number)
            return Sleeping(self._seconds / self._speed)

        # Named as in the whole model.
        named = OrderedDict((str(number), layer(number)) for number in range(start, stop))
        return nn.Sequential(named).to(device)


class Clock(L.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if len(self.ends) < trainer.global_step:
            self.ends.append(time.perf_counter())
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def train(
    stages: int,
    virtual_stages: int,
    layers: int,
    micro_batches: int,
    seconds: float,
    steps: int,
    method: str = "uniform",
    speeds: Sequence[float] = (),
) -> tuple[float, list[float]]:
    """Train as one of the ranks; return the median seconds of a step, and the losses.

    Args:
        stages: Number of stages, one a rank.
        virtual_stages: Pieces of each stage.
        layers: Number of layers of the model.
        micro_batches: Number of micro-batches a step.
        seconds: Time of a layer's forward pass; backward takes twice that.
        steps: Number of timed steps.
        method: The strategy's ``partition_method``.
        speeds: Speeds of the ranks, passed to the strategy only for ``auto``.
    """
    clock = Clock()
    told = list(speeds) if speeds and method == "auto" else None
    strategy = PipeLiteStrategy(stages, method, virtual_stages=virtual_stages, speeds=told)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=stages, accumulate_grad_batches=micro_batches,
        max_steps=steps + 1, max_epochs=-1, callbacks=[clock], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randn(2, WIDTH, generator=generator) for _ in range(2)) for _ in range(micro_batches)]
    model = HandedLayers(Layers(seconds, layers, micro_batches, speeds[strategy.global_rank] if speeds else 1.0))
    trainer.fit(model, DataLoader(rows, batch_size=None, shuffle=False))  # type: ignore[arg-type]
    return statistics.median(b - a for a, b in itertools.pairwise(clock.ends)), clock.losses
