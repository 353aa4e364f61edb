"""The plan of a module that is there already: for the strategy, for the module itself, and for ``pipelite fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.plan.planner import Planner
from lightning_pipelite.plan.simulation import Simulation
from lightning_pipelite.plan.stages import StageMemory
from lightning_pipelite.strategy.layers import LayerCosts

if TYPE_CHECKING:
    from lightning_pipelite.module import PipeLiteModule

UNKNOWN_LENGTH = 4096  # tokens, where the data does not say; the balance of the stages hardly depends on it
FALLBACK = "recompute"  # where nothing is known to choose by


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
    """Return the bytes of the job's smallest GPU, or None. Collective, once the processes have joined."""
    mine = None
    if torch.cuda.is_available():
        mine = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    everyone = [mine]
    if dist.is_available() and dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    known = [size for size in everyone if size is not None]
    return min(known) if len(known) == len(everyone) else None


def layer_costs(module: PipeLiteModule) -> LayerCosts:
    """Return what each layer costs, for ``partition_method="auto"``. Collective, as all ranks must cut alike."""
    length, micro_batches = _lengths(module)
    planner = planner_of(
        module, sequence_len=length or UNKNOWN_LENGTH, micro_batches=micro_batches, memory=device_memory()
    )
    asked = planner.layers.activation_memory
    return planner.costs(FALLBACK if asked == "auto" and FALLBACK in planner.policies else planner.known(asked))


def choose_activation_memory(module: PipeLiteModule, stages: int, partition_method: str) -> str:
    """Return the first of keep, selective, recompute and offload with which every stage fits, for ``auto``. Collective.

    Args:
        module: not yet built.
        stages: of the pipeline.
        partition_method: how its layers are dealt out.

    Returns:
        The last of them if none fits, and ``recompute`` where no GPU or no length of the sequences is known.
    """
    length, micro_batches = _lengths(module)
    memory = device_memory()
    if length is None or memory is None:
        can = module.pipeline_layers()[0].skeleton.can_recompute
        return FALLBACK if can else "keep"
    planner = planner_of(module, sequence_len=length, micro_batches=micro_batches, memory=memory)
    return planner.choose_policy(stages, partition_method) or planner.policies[-1]


def planned_stages(module: PipeLiteModule, stages: int, method: str, memory: int | None) -> list[StageMemory] | None:
    """Return what each stage will take as the module is configured; None if its data has no length.

    Args:
        module: attached to a trainer.
        stages: of the pipeline.
        method: how the layers are dealt out.
        memory: bytes of a device; None if not known.
    """
    length, micro_batches = _lengths(module)
    if length is None:
        return None
    planner = planner_of(module, sequence_len=length, micro_batches=micro_batches, memory=memory)
    asked: str = planner.layers.activation_memory
    if asked == "auto":
        asked = planner.choose_policy(stages, method) or planner.policies[-1]
    return planner.stages(planner.split(stages, method, asked), planner.known(asked))


def check_fits(stages: list[StageMemory], memory: int) -> None:
    """Refuse a training of which a stage does not fit its GPU.

    Raises:
        ConfigurationError: with what to do about it.
    """
    number, fullest = max(enumerate(stages), key=lambda pair: pair[1].total)
    if fullest.total <= memory:
        return
    gib = 2**30
    raise ConfigurationError(
        f"stage {number} of {len(stages)} will take {fullest.total / gib:.1f} GiB of a GPU's {memory / gib:.1f} GiB: "
        f"{fullest.weights / gib:.1f} for weights, {(fullest.gradients + fullest.optimizer) / gib:.1f} for gradients "
        f"and optimizer, {(fullest.activations + fullest.transient) / gib:.1f} for activations; pipelite plan says "
        "what fits (more stages, activation_memory auto, a shorter sequence_len, load_in_4bit), and model.check_memory "
        "false trains regardless."
    )


def _lengths(module: PipeLiteModule) -> tuple[int | None, int]:
    """The tokens of a micro-batch, and the micro-batches of a step, as far as the trainer knows them."""
    trainer: Any = module._trainer
    data = getattr(trainer, "datamodule", None)
    length = getattr(data, "sequence_len", None)
    return length, getattr(trainer, "accumulate_grad_batches", 1)
