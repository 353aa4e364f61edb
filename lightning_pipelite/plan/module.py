"""The planner of a module, and what there is to plan for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_pipelite.plan.planner import Planner
from lightning_pipelite.plan.simulation import Simulation

if TYPE_CHECKING:
    from lightning_pipelite.module import PipeLiteModule


def planner_of(module: PipeLiteModule, *, sequence_len: int, micro_batches: int, memory: int | None = None) -> Planner:
    """Return a planner for a module.

    Args:
        module: whose layers, loss and optimizer are planned for.
        sequence_len: tokens of a micro-batch.
        micro_batches: of a step.
        memory: bytes of a device; None if not known.
    """
    layers, loss = module.pipeline_layers()
    make = module.optimizer_factory
    simulation = Simulation(layers, loss, lambda parameters: make(parameters, 1e-3))
    return Planner(simulation, micro_batches=micro_batches, sequence_len=sequence_len, memory=memory)


def device_memory() -> int | None:
    """Return the bytes of this machine's smallest GPU, or None."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
