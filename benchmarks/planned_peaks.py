"""The memory that a plan predicts for each stage of a job, to compare with measurements."""

from __future__ import annotations

from collections.abc import Sequence

import tests_support  # noqa: F401
from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.simulation import Simulation
from scaling_jobs import Setting, make_module


def planned_peaks(
    setting: Setting, way: str, bounds: Sequence[int], virtual_stages: int, micro_batches: Sequence[int]
) -> list[list[float]]:
    """Return the predicted peak of torch's allocated GiB of each stage, for each number of micro-batches.

    Args:
        setting: What all jobs have in common.
        way: One of ``scaling_jobs.WAYS``.
        bounds: Where the layers are cut into pieces.
        virtual_stages: Number of pieces of a stage.
        micro_batches: Numbers of micro-batches a step.
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
