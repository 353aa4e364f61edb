"""Plans whether training fits, with which split and which activation memory policy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.gpus import Gpu
from lightning_pipelite.planning.longest import find_longest
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.stages import CONTEXT, WORKSPACE, StageMemory, stage_memory, step
from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.partition import method_of, partition, spans_of

MARGIN = 0.03  # share of a device's memory kept free, as predictions may be that much too low
POLICIES = ("keep", "selective", "recompute", "offload")  # fastest first
LONGEST = 2**20  # tokens, for a model that sets no limit
STEP = 256  # tokens: the largest sequence is a multiple of it
VIRTUAL_STAGES = (1, 2, 4)
WORTH = 0.02  # share of a step's time that more pieces per stage must save


@dataclass(frozen=True)
class Recommended:
    """The settings with which a step is fastest.

    Attributes:
        stages: Number of pipeline stages.
        virtual_stages: Pieces per stage.
        policy: Activation memory policy.
        bounds: The bounds of all pieces.
        method: The ``partition_method`` that gives this split: auto if devices differ in speed, as only auto heeds it.
        micro_batches: Micro-batches per step, for the requested number of sequences.
        seconds: The time of a step.
    """

    stages: int
    virtual_stages: int
    policy: str
    bounds: list[int]
    method: str
    micro_batches: int
    seconds: float

    @property
    def options(self) -> dict[str, int | str]:
        """The options of the strategy."""
        virtual = {"virtual_stages": self.virtual_stages} if self.virtual_stages > 1 else {}
        return {"pipeline_stages": self.stages, **virtual, "partition_method": self.method}


class Planner:
    """Plans how to train a model.

    Args:
        simulation: Simulation of the layers.
        micro_batches: Micro-batches per step.
        sequence_len: Tokens per micro-batch.
        devices: Devices to train on; if not given, one with unknown memory.
    """

    def __init__(
        self, simulation: Simulation, *, micro_batches: int, sequence_len: int, devices: Devices | None = None
    ) -> None:
        self._simulation = simulation
        self.micro_batches, self.sequence_len, self.devices = micro_batches, sequence_len, devices or Devices(1)
        meta_model = simulation.layers.meta_model
        self._costs: dict[str, LayerCosts] = {}
        self._splits: dict[Any, list[int]] = {}
        self._others: dict[Any, Planner] = {}
        self.policies = [p for p in POLICIES if p == "keep" or meta_model.can_recompute]

    def on(self, devices: Devices) -> Planner:
        """Return a planner of the same training on other devices; the layers are not tried again."""
        other = copy(self)
        other.devices = devices
        return other

    def of(self, micro_batches: int) -> Planner:
        """Return a planner of the same training with another number of micro-batches per step."""
        if micro_batches == self.micro_batches:
            return self
        other = copy(self)
        other.micro_batches, other._costs, other._splits = micro_batches, {}, {}
        return self._others.setdefault((micro_batches, self.devices), other)

    def with_layers(self, layers: CausalLMLayers) -> Planner:
        """Return a planner of the same training with other layers."""
        return self._of_simulation(self._simulation.on(layers))

    def with_offloaded_optimizer(self) -> Planner | None:
        """Return a planner with the optimizer state in host memory; None if it already is there, or cannot be."""
        simulation = self._simulation.with_offloaded_optimizer()
        return None if simulation is None else self._of_simulation(simulation)

    def _of_simulation(self, simulation: Simulation) -> Planner:
        return Planner(
            simulation, micro_batches=self.micro_batches, sequence_len=self.sequence_len, devices=self.devices
        )

    @property
    def gpu(self) -> Gpu:
        """The GPU whose speed is assumed."""
        return self._simulation.gpu

    @property
    def memory(self) -> int | None:
        """Bytes of the smallest device; None if not known."""
        return min(self.devices.memory, default=None)

    @property
    def layers(self) -> CausalLMLayers:
        """The model's layers."""
        return self._simulation.layers

    def stages(
        self, bounds: Sequence[int], policy: str, sequence_len: int | None = None, virtual_stages: int = 1
    ) -> list[StageMemory]:
        """Return what each stage of a split takes on its device; ``bounds`` are those of all pieces."""
        length, stages = sequence_len or self.sequence_len, (len(bounds) - 1) // virtual_stages
        each = [self._stage(bounds, number, policy, length, virtual_stages) for number in range(stages)]
        if not (speeds := self.devices.speed_of_stages(stages)):
            return each
        return [
            replace(stage, piece_seconds=tuple(seconds / speed for seconds in stage.piece_seconds))
            for stage, speed in zip(each, speeds, strict=True)
        ]

    def _stage(
        self, bounds: Sequence[int], number: int, policy: str, sequence_len: int, virtual_stages: int = 1
    ) -> StageMemory:
        stages = (len(bounds) - 1) // virtual_stages
        return stage_memory(
            self._simulation,
            spans_of(bounds, stages, number),
            stage=number,
            stages=stages,
            micro_batches=self.micro_batches,
            policy=policy,
            sequence_len=sequence_len,
        )

    def fits(self, stages: Sequence[StageMemory]) -> bool:
        """Return whether every stage fits its device, with a margin; True if the memory is not known."""
        limits = self.limits(len(stages))
        return all(stage.total <= limit for stage, limit in zip(stages, limits, strict=False))

    def limits(self, stages: int) -> list[int]:
        """Return the bytes of its device that each stage may take: all but the margin; empty if not known."""
        return [int((1 - MARGIN) * size) for size in self.devices.memory_of_stages(stages)]

    def costs(self, policy: str, stages: int) -> LayerCosts:
        """Return the time and the bytes of each item, on its own in the middle of a pipeline.

        Args:
            policy: Activation memory policy.
            stages: Number of pipeline stages, for the memory and the speeds of their devices.
        """
        if policy not in self._costs:
            self._costs[policy] = self._find_costs(policy)
        costs, limits = self._costs[policy], self.limits(stages)
        beside = self._beside(policy) if limits else 0
        usable = [limit - beside for limit in limits]
        return replace(costs, memory=usable or None, speeds=self.devices.speed_of_stages(stages))

    def _find_costs(self, policy: str) -> LayerCosts:
        length = self.sequence_len
        seconds, held, retained = [], [], []
        for number in range(len(self.layers)):
            cost = stage_memory(
                self._simulation,
                [(number, number + 1)],
                stage=0,
                stages=1,
                micro_batches=max(2, self.micro_batches),
                policy=policy,
                sequence_len=length,
            )
            seconds.append(cost.seconds)
            held.append(cost.weights + cost.gradients + cost.optimizer)
            trial = self._simulation.trial(number, policy, length)
            received = trial.entry.retained if number == 0 else 0  # the others: once per stage, not once per item
            retained.append(received + trial.item.retained - trial.unsaved + max(0, trial.tail.retained))
        return LayerCosts(seconds, held, retained, self.micro_batches)

    def _beside(self, policy: str) -> int:
        """Return the bytes that a stage takes in addition to the sum over its layers.

        These are the largest transient memory, the exchange buffers and the reserve.
        """
        single = self._stage([0, len(self.layers)], 0, policy, self.sequence_len)
        return single.transient + single.exchange + single.reserve

    def split(self, stages: int, method: str, policy: str, virtual_stages: int = 1) -> list[int]:
        """Return the bounds of all pieces of the stages."""
        asked = stages, virtual_stages, method, policy, self.devices
        if asked not in self._splits:
            self._splits[asked] = partition(_Layers(self, policy, stages), stages, method, virtual_stages)
        return self._splits[asked]

    def choose_policy(self, stages: int, method: str, virtual_stages: int = 1) -> str | None:
        """Return the first of keep, selective, recompute and offload that fits; None if none does."""
        for policy in self.policies:
            bounds = self.split(stages, method, policy, virtual_stages)
            if self.fits(self.stages(bounds, policy, virtual_stages=virtual_stages)):
                return policy
        return None

    def recommend(self, sequences: int) -> Recommended | None:
        """Return the settings with which a step of ``sequences`` is fastest; None if nothing fits.

        Stages must divide the devices, and replicas the sequences: more stages mean fewer replicas, with more
        micro-batches each. More pieces per stage are recommended only for a gain that can be measured.

        Args:
            sequences: Sequences per step over all replicas.
        """
        best: Recommended | None = None
        for stages, policy in itertools.product(self.stage_counts(sequences), self.policies):
            planner = self.of(sequences * stages // self.devices.count)
            for virtual_stages in VIRTUAL_STAGES if stages > 1 else (1,):
                if stages * virtual_stages > len(self.layers):
                    continue
                # A lower bound: the work alone, without a bubble.
                work, speeds = planner.costs(policy, stages).seconds, self.devices.speed_of_stages(stages)
                least = sum(work) * planner.micro_batches / sum(speeds or [1] * stages)
                if virtual_stages > 1 and best and least > (1 - WORTH) * best.seconds:
                    continue
                bounds = planner.split(stages, "auto", policy, virtual_stages)
                each = planner.stages(bounds, policy, virtual_stages=virtual_stages)
                if not planner.fits(each):
                    continue
                time = step(each, planner.micro_batches).seconds
                if best is None or time < (1 - WORTH * (virtual_stages > 1)) * best.seconds:
                    method = "auto" if speeds else method_of(bounds)
                    best = Recommended(stages, virtual_stages, policy, bounds, method, planner.micro_batches, time)
        return best

    def stage_counts(self, sequences: int) -> list[int]:
        """Return the numbers of stages that divide the devices into replicas which divide the sequences of a step."""
        devices = self.devices.count
        most = min(devices, len(self.layers))
        return [n for n in range(1, most + 1) if devices % n == 0 and sequences % (devices // n) == 0]

    def largest_sequence(self, bounds: Sequence[int], policy: str, virtual_stages: int = 1) -> int:
        """Return the most tokens per micro-batch that fit and the model supports, a multiple of 256; 0 if none do.

        Memory grows almost linearly with the sequence, and two points are known. What the fullest stage can take is
        found first, and mostly the others can take it too.
        """
        if not self.devices.memory:
            raise ValueError("the memory of a device is not known")
        count = (len(bounds) - 1) // virtual_stages
        limits = self.limits(count)

        def excess(number: int, length: int) -> float:
            return self._stage(bounds, number, policy, length, virtual_stages).total - limits[number]

        longest = getattr(self.layers.meta_model.config, "max_position_embeddings", None) or LONGEST
        stages = [self._stage(bounds, number, policy, self.sequence_len, virtual_stages) for number in range(count)]
        tightest = sorted(range(count), key=lambda number: limits[number] - stages[number].total)
        for place, number in enumerate(tightest):
            stage, limit = stages[number], limits[number]
            empty = stage.weights + stage.gradients + stage.optimizer + CONTEXT + WORKSPACE
            known: dict[int, float] = {0: empty - limit, self.sequence_len: stage.total - limit}
            if place > 0 and longest > 0:
                known[longest] = excess(number, longest)
            longest = find_longest(partial(excess, number), known, longest, STEP)
        return longest

    def fewest_devices(self) -> tuple[int, str] | None:
        """Return how many devices, from the first on, are enough and with which policy; None if all are too few."""
        for stages in range(1, min(self.devices.count, len(self.layers)) + 1):
            if policy := self.on(self.devices.first(stages)).choose_policy(stages, "auto"):
                return stages, policy
        return None


class _Layers:
    """The layers in the form that :func:`partition` takes."""

    def __init__(self, planner: Planner, policy: str, stages: int) -> None:
        self._planner, self._policy, self._stages = planner, policy, stages
        self.names: Sequence[str] = planner.layers.names
        self.one_stage_only = planner.layers.one_stage_only

    def parameter_counts(self) -> list[int]:
        return self._planner.layers.parameter_counts()

    def layer_costs(self) -> LayerCosts:
        return self._planner.costs(self._policy, self._stages)

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        raise NotImplementedError("a plan does not build stages")
