"""Plans the training run that is about to start: which activations to keep, what layers cost, and whether it fits."""

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
    """How to train, and on which devices.

    Attributes:
        stages: Number of pipeline stages.
        virtual_stages: Pieces per stage.
        method: The strategy's ``partition_method``.
        micro_batches: Micro-batches per step.
        sequence_len: Tokens per micro-batch.
        devices: The devices of all ranks.
    """

    stages: int
    method: str
    micro_batches: int
    sequence_len: int
    devices: Devices
    virtual_stages: int = 1


@dataclass(frozen=True)
class PlannedTraining:
    """What a training run will take.

    Attributes:
        activation_memory: The policy; if it was to be chosen, the first that fits, or the last if none does.
        costs: The costs of the layers with this policy.
        peaks: Bytes that torch will have allocated at the peak, for each stage.
        refusal: Why it does not fit, and what to do; empty if it fits.
        advice: What would be faster; empty if nothing is known.
    """

    activation_memory: str
    costs: LayerCosts
    peaks: Sequence[int]
    refusal: str
    advice: str = ""


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU that this process may take, including its context; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)  # by this process, for something else
    mine = free + torch.cuda.memory_reserved(device) - used + CONTEXT
    return min(mine, int(torch.cuda.get_per_process_memory_fraction(device) * total) - used)


def plan_training(
    layers: CausalLMLayers, loss: Callable[[Any, Any], Any], make_optimizer: Callable[..., Any], job: Job, choose: bool
) -> PlannedTraining | str:
    """Plan a training run, on the meta device.

    Args:
        layers: The layers to train.
        loss: The loss on the last stage's output.
        make_optimizer: Creates the optimizer of the given parameters.
        job: How to train, and on which devices.
        choose: Whether to choose the activation memory policy; otherwise it is that of ``layers``.

    Returns:
        The plan, or the reason why it could not be made, which need not prevent training.
    """
    try:
        return _plan(layers, loss, make_optimizer, job, choose)
    except Exception as error:  # a bug of the planner, or a model or optimizer that cannot run without weights
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
            f"{policy}, but its GPU has {gib(sizes[fullest])}, of which it may take "
            f"{gib(planner.limits(job.stages)[fullest])} ({MARGIN:.0%} is kept free, as a plan may be that much too "
            f"low): {_advice(planner, job)}, or set model.check_memory to false to try anyway."
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
        if recommended.micro_batches != job.micro_batches:  # for the same number of sequences per step
            further = {"trainer.accumulate_grad_batches": str(recommended.micro_batches), **further}
        rest = " and ".join(f"{name} to {value}" for name, value in further.items())
        return f"set the strategy's {', '.join(others)} and {last}, and {rest}"
    ways = ways_to_fit(planner, sequences)
    return f"use one of these: {'; '.join(ways)}" if ways else "use GPUs with more memory, or a smaller model"


def compared(planned: Sequence[int], measured: Sequence[int]) -> str:
    """Return a line that compares the peak bytes that torch has allocated in each stage with the plan."""
    each = (
        f"stage {number}: {gib(most)} (planned {gib(peak)})"
        for number, (peak, most) in enumerate(zip(planned, measured, strict=True))
    )
    return f"peak memory: {', '.join(each)}"
