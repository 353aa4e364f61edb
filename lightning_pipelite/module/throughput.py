"""The speed of training."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.flops import TrainingFlops, peak_flops, training_flops
from lightning_pipelite.shared.async_scalar import AsyncScalar
from lightning_pipelite.shared.over_ranks import gathered
from lightning_pipelite.shared.step_clock import StepClock
from lightning_pipelite.strategy import PipeLiteStrategy


class Speed:
    """Measures steps, each from the previous step's loss to its own, excluding the time during which it is paused.

    A step's last backward pass may still be running when its loss is known, so only such intervals add up to the total.

    Args:
        replicas: Number of replicas of the pipeline, each of which trains on the same number of tokens.
        flops: What the model needs, if known.
        peak: The FLOP/s of all devices together, if known.
    """

    def __init__(self, replicas: int = 1, flops: TrainingFlops | None = None, peak: float | None = None) -> None:
        self._replicas, self._flops, self._peak = replicas, flops, peak
        self._tokens = 0
        self._pairs: list[AsyncScalar] = []
        self._clock: StepClock | None = None  # from the first micro-batch on

    def begin(self, position_ids: Tensor) -> None:
        """Record the start of a micro-batch, the first of a step or a further one.

        Args:
            position_ids: Int64 [batch, sequence], from 0 at the start of every document.
        """
        self._clock = self._clock or StepClock()
        self._clock.go_on()
        if self._tokens == 0:
            self._pairs = []
        self._tokens += position_ids.numel()
        if self._flops is not None and self._peak is not None:
            # Read at the end of the step, long after it has arrived.
            self._pairs.append(AsyncScalar((2 * position_ids + 1).sum()))  # the first n odd numbers add up to n * n

    def pause(self) -> None:
        """Stop the clock: the device is idle, and what happens before the next micro-batch is not training."""
        if self._clock is not None:
            self._clock.pause()

    def end(self) -> dict[str, float]:
        """Record the end of a step, once the host has waited for its loss.

        Returns:
            ``train/tokens_per_s``, padding included, and ``train/mfu``: the share of the devices' peak rate that the
            model's arithmetic reaches, as :func:`~lightning_pipelite.models.flops.training_flops` counts it; left out
            if either is unknown. All replicas are assumed to have documents of the same lengths as this one.
        """
        assert self._clock is not None
        seconds, tokens = self._clock.step(), self._tokens * self._replicas
        self._tokens = 0
        speeds = {"train/tokens_per_s": tokens / seconds}
        if self._flops is not None and self._peak is not None:
            pairs = sum(read.value() for read in self._pairs) * self._replicas
            speeds["train/mfu"] = self._flops.of(tokens, pairs) / seconds / self._peak
        return speeds


def speed_of(
    layers: CausalLMLayers, parameters: Iterable[tuple[str, nn.Parameter]], strategy: PipeLiteStrategy
) -> Speed:
    """Make the meter of a training's speed. Collective: the trained parameters of all stages count.

    Args:
        layers: The model's layers.
        parameters: This rank's parameters, by name.
        strategy: Knows the devices.
    """
    trained = {name: torch.empty_like(p, device="meta") for name, p in parameters if p.requires_grad}
    flops = training_flops(layers.meta_model, dict(ChainMap(*gathered(trained))))
    device = strategy.root_device
    peak = peak_flops(torch.cuda.get_device_name(device), layers.dtype) if device.type == "cuda" else None
    return Speed(strategy.topology.replicas, flops, peak and peak * strategy.world_size)
