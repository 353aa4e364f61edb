"""What each stage of a pipeline takes: the sum of its layers, with what is held at once."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.trial import Part, Trial

CONTEXT = 600 * 2**20
"""Bytes of a CUDA context with the kernels that are loaded, and NCCL's buffers: outside of torch's allocator."""
WORKSPACE = 32 * 2**20
"""Bytes of cuBLAS' workspace, which torch allocates once on Hopper (8 MiB before)."""
FRAGMENTATION = 0.04
"""Share of what comes and goes that torch's allocator keeps unused between its blocks."""
FLOPS = {1: 1050e12, 2: 600e12, 4: 45e12}
"""Operations a second by the bytes of an element, and"""
BANDWIDTH = 2.4e12
"""bytes a second that one H100 reaches in training; other GPUs have other numbers, but much the same ratios."""


@dataclass(frozen=True)
class StageMemory:
    """The memory of one stage and what makes it up, in bytes.

    Attributes:
        start: Its first item.
        stop: The item after its last.
        parameters: The number of weights of the base model.
        trained: The number of trained parameters.
        weights: All parameters and buffers.
        gradients: Of the trained parameters.
        optimizer: The optimizer's state.
        activations: What all micro-batches in flight retain, with the inputs that are received.
        transient: What comes and goes beside: a layer that is recomputed, its gradients, the logits of a chunk.
        loss: What head and loss retain and take for themselves; in the last stage. It is part of the two above.
        exchange: Buffers of what is received and sent.
        in_flight: How many micro-batches are held at once.
        peak: The most that torch allocates.
        reserve: CUDA's context and what the allocator cannot use.
        seconds: The time of a micro-batch, forward and backward, on one H100.
        sent: Bytes that a step sends over the boundary to the next stage, both ways.
    """

    start: int
    stop: int
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    loss: int
    exchange: int
    in_flight: int
    peak: int
    reserve: int
    seconds: float
    sent: int

    @property
    def total(self) -> int:
        """All that the stage takes of a GPU's memory."""
        return self.peak + self.reserve


def stage_memory(
    simulation: Simulation,
    start: int,
    stop: int,
    *,
    stage: int,
    stages: int,
    micro_batches: int,
    policy: str,
    sequence_len: int,
) -> StageMemory:
    """Return what a stage takes.

    In the 1F1B schedule stage i of p holds up to p - i micro-batches (Narayanan et al. 2021,
    https://arxiv.org/abs/2104.04473, section 2.2). The peak is the largest of these moments of the last of them: in the
    forward pass inside an item, with what those before it retained; and in the backward pass inside an item, with what
    those up to it retained. Gradients are there from the first micro-batch's backward pass on.

    Args:
        simulation: knows the items.
        start: the stage's first item.
        stop: the item after its last.
        stage: its number.
        stages: how many there are.
        micro_batches: of a step.
        policy: of activation memory.
        sequence_len: tokens of a micro-batch.
    """
    first = micro_batches == 1  # then gradients come with the backward pass
    trials = stage_trials(simulation, start, stop, policy, sequence_len, first=first)
    entry, tail = trials[0].entry, trials[-1].tail
    # What the entry holds only while the stage runs forward is seen where nothing follows the item.
    middle = trials[0] if trials[0].hidden else _middle(simulation, policy, sequence_len, first=first)
    passing = min(0, middle.tail.retained) if middle else 0
    last = trials[-1] if trials[-1].hidden else _middle(simulation, policy, sequence_len, first=first)
    passed = min(0, last.tail.retained) if last else 0
    kept_by_tail = tail.retained - passed
    items = [trial.item for trial in trials]
    in_flight = min(micro_batches, stages - stage)
    retained = [items[0].retained, *(trial.item.retained - trial.unsaved for trial in trials[1:])]
    everything = entry.retained + passing + sum(retained) + kept_by_tail
    parts = [entry, *items, tail]
    tied = trials[-1].tied if start == 0 else Part()  # held once by a stage that has both ends

    def held_by_all(name: str) -> int:
        return int(sum(getattr(part, name) for part in parts) - getattr(tied, name))

    weights, gradients, optimizer = (held_by_all(name) for name in ("weights", "gradients", "optimizer"))
    hidden = max(trial.hidden for trial in trials)
    exchange = trials[-1].hidden + (hidden if stage > 0 else 0)
    static = weights + optimizer + exchange + WORKSPACE
    held = static + (in_flight - 1) * everything
    moments = [held + entry.forward, held + everything - kept_by_tail - passing + tail.forward]
    made = 0 if first else gradients
    moments = [moment + made for moment in moments]
    level = entry.retained
    for part, kept in zip(items, retained, strict=True):
        moments.append(held + made + level + part.forward)
        level += kept
    moments.append(held + made + everything + tail.backward)
    handover = trials[-1].handover
    if not trials[-1].hidden:
        handover -= passed
    level = everything - kept_by_tail
    if not first:  # autograd adds the embedding's to the head's before it adds both to the gradient that is there
        level += tied.gradients
    for part, kept in zip(reversed(items), reversed(retained), strict=True):
        moments.append(held + made + level + handover + part.backward)
        level -= kept
        made += part.gradients if first else 0
    moments.append(held + made + level + handover + entry.backward)
    moments.append(static + gradients)  # in the optimizer's step
    peak = max(moments)
    activations = in_flight * everything
    transient = max(0, peak - static - gradients - activations)
    flops: dict[int, float] = {}
    for part in parts:
        for width, count in part.flops.items():
            flops[width] = flops.get(width, 0.0) + count
    return StageMemory(
        start=start,
        stop=stop,
        parameters=held_by_all("parameters"),
        trained=held_by_all("trained"),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        transient=transient,
        loss=kept_by_tail + max(tail.forward, tail.backward) if trials[-1].hidden == 0 else 0,
        exchange=exchange,
        in_flight=in_flight,
        peak=peak,
        reserve=CONTEXT + int(FRAGMENTATION * (activations + transient)),
        seconds=sum(seconds(part) for part in parts),
        sent=2 * trials[-1].hidden * micro_batches if stage < stages - 1 else 0,
    )


def _middle(simulation: Simulation, policy: str, sequence_len: int, *, first: bool) -> Trial | None:
    """An item that is neither the first nor the last, if there is one."""
    return simulation.trial(1, policy, sequence_len, first=first) if len(simulation.layers) > 2 else None


def stage_trials(
    simulation: Simulation, start: int, stop: int, policy: str, sequence_len: int, *, first: bool
) -> list[Trial]:
    """Return the trial of each item of a stage; the backward pass goes on to the lowest that is trained."""
    trials: list[Trial] = []
    goes_on = start > 0
    for number in range(start, stop):
        trial = simulation.trial(number, policy, sequence_len, input_grad=goes_on or number == 0, first=first)
        trials.append(trial)
        goes_on = goes_on or trial.entry.trained + trial.item.trained > 0
    return trials


def seconds(part: Part) -> float:
    """Return how long a part takes forward and backward, by what it computes and what it moves."""
    return sum(count / FLOPS.get(width, FLOPS[4]) for width, count in part.flops.items()) + part.moved / BANDWIDTH


def bubble(stages: int, micro_batches: int) -> float:
    """Return the share of time in which a stage waits, (p - 1) / (m + p - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)
