"""The memory that a plan says each stage of a job takes, to be held against what is measured."""

from __future__ import annotations

from collections.abc import Sequence

import tests_support  # noqa: F401
from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.simulation import Simulation
from scaling_jobs import Setting, make_module


def planned_peaks(
    setting: Setting, way: str, bounds: Sequence[int], virtual_stages: int, micro_batches: Sequence[int]
) -> list[list[float]]:
    """GiB that torch allocates at most in each stage, for each number of micro-batches.

    Args:
        setting: What all jobs have in common.
        way: lora, qlora or full.
        bounds: Where the layers are cut into pieces.
        virtual_stages: How many of these a stage has.
        micro_batches: Of a step.
    """
    module = make_module(setting, way)
    layers, loss = module.pipeline_layers()
    simulation = Simulation(layers, loss, lambda parameters: module.optimizer_factory(parameters, 1e-3))
    planner = Planner(simulation, micro_batches=micro_batches[0], sequence_len=setting.length)
    policy = str(setting.activation_memory)
    return [
        [stage.peak / 2**30 for stage in planner.of(m).stages(bounds, policy, virtual_stages=virtual_stages)]
        for m in micro_batches
    ]
