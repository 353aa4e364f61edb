"""What consecutive layers take: sums over them, and the peak of what they hold at once."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_pipelite.planning.gpus import Gpu
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.trial import Part, Trial

# Attributes of a Part that are held at all times.
HELD = ("parameters", "trained", "weights", "gradients", "optimizer", "optimizer_on_host")


@dataclass(frozen=True)
class PieceMemory:
    """What consecutive items take: one piece of a stage, or a whole stage.

    Attributes:
        parameters: The number of weights of the base model.
        trained: The number of trained parameters.
        weights: Bytes of all parameters and buffers.
        gradients: Bytes of the gradients.
        optimizer: Bytes of the optimizer state on the device.
        optimizer_on_host: Bytes of optimizer state in host memory between steps, not included in ``optimizer``.
        optimizer_passing: Bytes of the latter that are on the device at once within a step.
        everything: Bytes that a micro-batch retains between its passes.
        forward: Peak bytes of the forward pass, on top of what other micro-batches retain.
        backward: The same for the backward pass.
        loss: Bytes that the head and the loss retain and use temporarily.
        hidden: Bytes sent on per micro-batch; 0 at the end of the model.
        received: Bytes received per micro-batch.
        offloaded: Bytes that a micro-batch keeps in host memory between its passes.
        seconds: The time of a micro-batch, forward and backward, on the simulation's GPU.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    optimizer_on_host: int
    optimizer_passing: int
    everything: int
    forward: int
    backward: int
    loss: int
    hidden: int
    received: int
    offloaded: int
    seconds: float


def piece_memory(
    simulation: Simulation, start: int, stop: int, policy: str, sequence_len: int, *, first: bool
) -> PieceMemory:
    """Return what items ``start`` to ``stop`` (exclusive) take.

    The peak of each pass is its largest moment: in the forward pass inside an item, with what the items before it
    retained; in the backward pass inside an item, with what the items up to and including it retained.

    Args:
        simulation: Simulation of the items.
        start: The first item.
        stop: The item after the last.
        policy: Activation memory policy.
        sequence_len: Tokens per micro-batch.
        first: Whether this backward pass allocates the gradients.
    """
    trials = stage_trials(simulation, start, stop, policy, sequence_len, first=first)
    entry, tail = trials[0].entry, trials[-1].tail
    # What the entry holds only during the stage's forward pass shows in a trial where nothing follows the item.
    middle = trials[0] if trials[0].hidden else _middle(simulation, policy, sequence_len, first=first)
    passing = min(0, middle.tail.retained) if middle else 0
    last = trials[-1] if trials[-1].hidden else _middle(simulation, policy, sequence_len, first=first)
    passed = min(0, last.tail.retained) if last else 0
    kept_by_tail = tail.retained - passed
    items = [trial.item for trial in trials]
    retained = [items[0].retained, *(trial.item.retained - trial.unsaved for trial in trials[1:])]
    everything = entry.retained + passing + sum(retained) + kept_by_tail
    parts = [entry, *items, tail]
    tied = trials[-1].tied if start == 0 else Part()  # a stage with both ends holds it once

    def held_by_all(name: str) -> int:
        return int(sum(getattr(part, name) for part in parts) - getattr(tied, name))

    forward = [entry.forward, everything - kept_by_tail - passing + tail.forward]
    level = entry.retained
    for part, kept in zip(items, retained, strict=True):
        forward.append(level + part.forward)
        level += kept
    backward = [everything + tail.backward]
    handover = trials[-1].handover
    if not trials[-1].hidden:
        handover -= passed
    level = everything - kept_by_tail
    if not first:  # autograd sums the embedding's and the head's before it accumulates into the existing gradient
        level += tied.gradients
    made = 0
    for part, kept in zip(reversed(items), reversed(retained), strict=True):
        backward.append(made + level + handover + part.backward)
        level -= kept
        made += part.gradients if first else 0
    backward.append(made + level + handover + entry.backward)
    return PieceMemory(
        **{name: held_by_all(name) for name in HELD},
        optimizer_passing=max(part.optimizer_passing for part in parts),
        everything=everything,
        forward=max(forward),
        backward=max(backward),
        loss=kept_by_tail + max(tail.forward, tail.backward) if trials[-1].hidden == 0 else 0,
        hidden=trials[-1].hidden,
        received=max(trial.hidden for trial in trials),
        offloaded=sum(trial.offloaded for trial in trials),
        seconds=sum(seconds(part, simulation.gpu) for part in parts),
    )


def _middle(simulation: Simulation, policy: str, sequence_len: int, *, first: bool) -> Trial | None:
    """Return the trial of an item that is neither the first nor the last, if there is one."""
    return simulation.trial(1, policy, sequence_len, first=first) if len(simulation.layers) > 2 else None


def stage_trials(
    simulation: Simulation, start: int, stop: int, policy: str, sequence_len: int, *, first: bool
) -> list[Trial]:
    """Return the trial of each item of a stage; the backward pass continues down to the lowest trained one."""
    trials: list[Trial] = []
    goes_on = start > 0
    for number in range(start, stop):
        trial = simulation.trial(number, policy, sequence_len, input_grad=goes_on or number == 0, first=first)
        trials.append(trial)
        goes_on = goes_on or trial.entry.trained + trial.item.trained > 0
    return trials


def seconds(part: Part, gpu: Gpu) -> float:
    """Return the seconds that a part takes, forward and backward, for its operations and the bytes that it moves."""
    computed = sum(count / gpu.flops(width) for width, count in part.flops.items())
    return computed + part.moved / gpu.bytes_a_second
