"""Times of single layers and transfers, as input to a simulation of the schedule."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

import tests_support  # noqa: F401
from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.partition import balanced_bounds, interleaved_bounds
from lightning_pipelite.strategy.timeline import simulate as play
from random_model import random_sequences
from scaling_jobs import Setting, make_module
from schedule_simulation import Stage, simulate


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a micro-batch in a decoder layer, and what the first and the last stage take beyond their layers."""

    layer: Stage
    first: Stage
    last: Stage

    def of_stages(self, bounds: list[int]) -> list[Stage]:
        """Return the times of stages cut at ``bounds``."""
        stages = []
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            ends = [self.first] * (number == 0) + [self.last] * (number == len(bounds) - 2)
            stages.append(
                Stage(
                    (stop - start) * self.layer.forward + sum(end.forward for end in ends),
                    (stop - start) * self.layer.backward + sum(end.backward for end in ends),
                )
            )
        return stages

    def weights(self, layers: int) -> tuple[int, ...]:
        """Return the weight of each layer, in nanoseconds."""
        weigh = [max(1, round(1e9 * (s.forward + s.backward))) for s in (self.layer, self.first, self.last)]
        return tuple(weigh[0] + weigh[1] * (i == 0) + weigh[2] * (i == layers - 1) for i in range(layers))

    def bounds(self, layers: int, stages: int, virtual_stages: int, micro_batches: int, balanced: bool) -> list[int]:
        """Return the bounds of all pieces of the stages, cut evenly or balanced by these times."""
        weights = self.weights(layers) if balanced else (1,) * layers
        if not balanced or virtual_stages == 1:
            return list(balanced_bounds(weights, stages * virtual_stages))
        nothing = [0] * layers
        return interleaved_bounds(LayerCosts(weights, nothing, nothing, micro_batches), stages, virtual_stages)

    def efficiency(self, bounds: Sequence[int], stages: int, micro_batches: int, transfer: float) -> float:
        """Return the share of a step in which the ranks compute, by simulating the schedule with these times."""
        pieces = self.of_stages(list(bounds))
        if len(pieces) == stages:
            return simulate(pieces, micro_batches, transfer, blocking=True).efficiency
        plan = interleaved_1f1b(stages, len(pieces) // stages, micro_batches)
        return play(plan, [each.forward for each in pieces], [each.backward for each in pieces], transfer).efficiency


def time_layers(setting: Setting, way: str) -> LayerTimes:
    """Time stages of the first layer, of the first three and of the last; a negative extra of an end becomes 0."""
    device = torch.device("cuda:0" if setting.on_gpu else "cpu")
    module = make_module(setting, way)
    layers, loss_of = module.pipeline_layers()
    (sequence,) = random_sequences(1, setting.length, setting.vocabulary)
    batch = {key: tensor.to(device) for key, tensor in sequence.items()}

    def timed(start: int, stop: int) -> Stage:
        stage = layers.build_stage(start, stop, device)
        stage.expect_documents(1)
        inputs = batch["input_ids"]
        if start > 0:
            hidden = layers.meta_model.config.hidden_size
            inputs = torch.randn(1, setting.length, hidden, device=device, dtype=layers.dtype).requires_grad_()
        forwards, backwards = [], []
        for _ in range(8):
            marks = [_now(device)]
            outputs = stage((inputs, batch["position_ids"]))
            if stop == len(layers):
                loss = loss_of(outputs, batch["labels"])[0]
                marks.append(_now(device))
                loss.backward()
            else:
                marks.append(_now(device))
                outputs[0].backward(torch.ones_like(outputs[0]))
            marks.append(_now(device))
            forwards.append(marks[1] - marks[0])
            backwards.append(marks[2] - marks[1])
        return Stage(statistics.median(forwards[3:]), statistics.median(backwards[3:]))

    one, three, last = timed(0, 1), timed(0, 3), timed(len(layers) - 1, len(layers))
    layer = Stage((three.forward - one.forward) / 2, (three.backward - one.backward) / 2)

    def beyond(stage: Stage) -> Stage:
        return Stage(max(0.0, stage.forward - layer.forward), max(0.0, stage.backward - layer.backward))

    return LayerTimes(layer, beyond(one), beyond(last))


def time_transfer(setting: Setting, elements: int) -> float:
    """Return the seconds of a transfer of bf16 hidden states between two ranks: half a round trip."""
    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if setting.on_gpu:
        device = torch.device("cuda", 0 if setting.one_gpu else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if setting.on_gpu else "gloo")
    tensor, times = torch.zeros(elements, dtype=torch.bfloat16, device=device), []
    for _ in range(12):
        began = _now(device)
        for sender in (0, 1):
            (dist.send if rank == sender else dist.recv)(tensor, 1 - rank)
        times.append((_now(device) - began) / 2)
    return statistics.median(times[2:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
