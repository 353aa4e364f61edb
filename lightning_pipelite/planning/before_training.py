"""A plan of the training that is about to start: what to keep of activations, what layers cost, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.leaving_out import faster_without
from lightning_pipelite.planning.planner import MARGIN, Planner
from lightning_pipelite.planning.settings import gib
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.stages import CONTEXT
from lightning_pipelite.planning.ways import ways_to_fit
from lightning_pipelite.shared.protocol import LayerCosts


@dataclass(frozen=True)
class Job:
    """What is to be trained on what.

    Attributes:
        stages: Of the pipeline.
        virtual_stages: Pieces of each stage.
        method: The strategy's ``partition_method``.
        micro_batches: Of a step.
        sequence_len: Tokens of a micro-batch.
        devices: Of all ranks.
    """

    stages: int
    method: str
    micro_batches: int
    sequence_len: int
    devices: Devices
    virtual_stages: int = 1


@dataclass(frozen=True)
class PlannedTraining:
    """What a training will take.

    Attributes:
        activation_memory: The policy: the first that fits, if it was to be chosen.
        costs: Of the layers, with it.
        peaks: What torch will have allocated in each stage, bytes.
        refusal: Why it does not fit, and what to do; empty if it fits.
        advice: What would be faster; empty if nothing is known.
    """

    activation_memory: str
    costs: LayerCosts
    peaks: Sequence[int]
    refusal: str
    advice: str = ""


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU that this process may take, its context's included; None of a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)  # by the process for something else
    mine = free + torch.cuda.memory_reserved(device) - used + CONTEXT
    return min(mine, int(torch.cuda.get_per_process_memory_fraction(device) * total) - used)


def plan_training(
    layers: CausalLMLayers, loss: Callable[[Any, Any], Any], make_optimizer: Callable[..., Any], job: Job, choose: bool
) -> PlannedTraining | str:
    """Plan a training, on the meta device.

    Args:
        layers: That are to be trained.
        loss: On what the last stage returns.
        make_optimizer: Makes the optimizer of some parameters.
        job: What they are trained on.
        choose: Whether to choose the policy of activation memory; else it is that of ``layers``.

    Returns:
        The plan; or why it could not be made, which need not keep anybody from training.
    """
    try:
        return _plan(layers, loss, make_optimizer, job, choose)
    except Exception as error:  # the plan's own, or of a model or optimizer that cannot be tried without weights
        return f"{type(error).__name__}: {error}"


def _plan(
    layers: CausalLMLayers, loss: Callable[[Any, Any], Any], make_optimizer: Callable[..., Any], job: Job, choose: bool
) -> PlannedTraining:
    policy: str = layers.activation_memory
    planner = Planner(
        Simulation(layers, loss, make_optimizer),
        micro_batches=job.micro_batches,
        sequence_len=job.sequence_len,
        devices=job.devices,
    )
    if choose and job.devices.memory:
        policy = planner.choose_policy(job.stages, job.method, job.virtual_stages) or planner.policies[-1]
    bounds = planner.split(job.stages, job.method, policy, job.virtual_stages)
    stages = planner.stages(bounds, policy, virtual_stages=job.virtual_stages)
    refusal = ""
    if not planner.fits(stages):
        sizes = job.devices.memory_of_stages(job.stages)
        fullest = max(range(len(stages)), key=lambda number: stages[number].total - sizes[number])
        refusal = (
            f"stage {fullest} of {len(stages)} would take {gib(stages[fullest].total)} with activation_memory "
            f"{policy}, and its GPU has {gib(sizes[fullest])}, of which it may take "
            f"{gib(planner.limits(job.stages)[fullest])} ({MARGIN:.0%} is kept free, as a plan may be that much too "
            f"low): {_advice(planner, job)}, or set model.check_memory to false to try."
        )
    advice = faster_without(planner, job.stages, policy, job.virtual_stages) if job.method == "auto" else ""
    return PlannedTraining(policy, planner.costs(policy, job.stages), [stage.peak for stage in stages], refusal, advice)


def _advice(planner: Planner, job: Job) -> str:
    if better := planner.choose_policy(job.stages, job.method, job.virtual_stages):
        return f"set model.activation_memory to {better}"
    sequences = job.micro_batches * (job.devices.count // job.stages)
    if (recommended := planner.recommend(sequences)) is not None:
        options = recommended.options
        if recommended.virtual_stages == 1 < job.virtual_stages:
            options["virtual_stages"] = 1
        *others, last = (f"{name} to {value}" for name, value in options.items())
        further = {"model.activation_memory": recommended.policy}
        if recommended.micro_batches != job.micro_batches:  # for the same sequences a step
            further = {"trainer.accumulate_grad_batches": str(recommended.micro_batches), **further}
        rest = " and ".join(f"{name} to {value}" for name, value in further.items())
        return f"set the strategy's {', '.join(others)} and {last}, and {rest}"
    ways = ways_to_fit(planner, sequences)
    return f"what would fit: {'; '.join(ways)}" if ways else "use GPUs with more memory, or a smaller model"


def compared(planned: Sequence[int], measured: Sequence[int]) -> str:
    """Return a line that holds what torch has allocated at most in each stage, in bytes, against the plan."""
    each = (
        f"stage {number}: {gib(most)} (planned {gib(peak)})"
        for number, (peak, most) in enumerate(zip(planned, measured, strict=True))
    )
    return f"memory at its peak: {', '.join(each)}"
