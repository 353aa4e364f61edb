"""What each stage of a pipeline takes: sums over its pieces, and the peak of what they hold at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_pipelite.planning.pieces import piece_memory
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.timeline import Timeline, simulate

CONTEXT = 600 * 2**20
"""Bytes of a CUDA context with its loaded kernels, and of transfer buffers, outside torch's allocator."""
WORKSPACE = 32 * 2**20
"""Bytes of cuBLAS's workspace, which torch allocates once on Hopper (8 MiB on earlier GPUs)."""
FRAGMENTATION = 0.04
"""Share of activations and transient memory that torch's allocator leaves unused between its blocks."""
BACKWARD = 2 / 3
"""Share of the backward pass in the time of both passes."""
PASS = 2e-4
"""Seconds that a pass takes in addition to its layers: to receive, to start and to send."""


@dataclass(frozen=True)
class StageMemory:
    """The memory of one stage and what makes it up, in bytes.

    Attributes:
        spans: First item and item after the last of each piece; one piece unless there are virtual stages.
        parameters: The number of weights of the base model.
        trained: The number of trained parameters.
        weights: All parameters and buffers.
        gradients: The gradients of the trained parameters.
        optimizer: The optimizer state.
        activations: What all micro-batches in flight retain, including received inputs.
        transient: Temporary memory besides: a recomputed layer, its gradients, the logits of a chunk.
        loss: What the head and the loss retain and use temporarily, in the last stage; part of the two above.
        exchange: Send and receive buffers.
        in_flight: The most micro-batches held at once, over all pieces.
        peak: The most that torch allocates.
        reserve: The CUDA context and what the allocator cannot use.
        piece_seconds: The time of a micro-batch in each piece, forward and backward.
        hidden: Bytes sent to the next piece per micro-batch.
        sent: Bytes that a step sends over the boundaries to the next stage, both ways.
        on_host: Bytes of inputs in host memory, with ``offload``.
        optimizer_on_host: Bytes of optimizer state in host memory between steps, with ``offload_optimizer``.
        link: Bytes per second between two stages.
    """

    spans: tuple[tuple[int, int], ...]
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
    piece_seconds: tuple[float, ...]
    hidden: int
    sent: int
    on_host: int
    optimizer_on_host: int
    link: float

    @property
    def seconds(self) -> float:
        """The time of a micro-batch in all pieces."""
        return sum(self.piece_seconds)

    @property
    def total(self) -> int:
        """All of a GPU's memory that the stage takes."""
        return self.peak + self.reserve


def stage_memory(
    simulation: Simulation,
    spans: Sequence[tuple[int, int]],
    *,
    stage: int,
    stages: int,
    micro_batches: int,
    policy: str,
    sequence_len: int,
) -> StageMemory:
    """Return what a stage takes.

    The order of the schedule determines how many micro-batches each piece holds while another one runs. With one piece
    per stage (1F1B), stage i of p holds up to p - i (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section
    2.2). The peak is the largest over all passes. Gradients exist from the first micro-batch's backward pass on.

    With several pieces, a pass's output is freed once it is sent. It counts as held until the backward pass all the
    same: the host, which allocates, can be that far ahead of a slow GPU, which sends. On a fast one it is an upper
    limit; H200s held 1 % less on 2 ranks with 4 pieces, and up to 6 % less on 4.

    Args:
        simulation: Simulation of the items.
        spans: First item and item after the last of each of the stage's pieces.
        stage: Number of the stage.
        stages: Number of stages.
        micro_batches: Micro-batches per step.
        policy: Activation memory policy.
        sequence_len: Tokens per micro-batch.
    """
    first = micro_batches == 1  # then the backward pass allocates the gradients
    pieces = [piece_memory(simulation, *span, policy, sequence_len, first=first) for span in spans]

    def of_all(name: str) -> int:
        return int(sum(getattr(piece, name) for piece in pieces))

    weights, gradients, optimizer = (of_all(name) for name in ("weights", "gradients", "optimizer"))
    received = max(piece.received for piece in pieces)
    exchange = pieces[-1].hidden + (received if stage > 0 else 0)
    if len(pieces) > 1:  # the input of this pass and of the next, and what is being sent
        exchange = 3 * received
    static = weights + optimizer + exchange + WORKSPACE
    made = 0 if first and len(pieces) == 1 else gradients
    passing = max(piece.optimizer_passing for piece in pieces)
    moments, activations, in_flight = [static + gradients + passing], 0, 0  # the first is the optimizer step
    for action, counts in interleaved_1f1b(stages, len(pieces), micro_batches).held(stage):
        piece = pieces[action.piece // stages]
        held = sum(count * each.everything for count, each in zip(counts, pieces, strict=True))
        activations, in_flight = max(activations, held + piece.everything), max(in_flight, sum(counts) + 1)
        moments.append(static + made + held + (piece.backward if action.backward else piece.forward))
    peak = max(moments)
    transient = max(0, peak - static - gradients - activations)
    return StageMemory(
        spans=tuple(spans),
        parameters=of_all("parameters"),
        trained=of_all("trained"),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        transient=transient,
        loss=pieces[-1].loss,
        exchange=exchange,
        in_flight=in_flight,
        peak=peak,
        reserve=CONTEXT + int(FRAGMENTATION * (activations + transient)),
        piece_seconds=tuple(piece.seconds for piece in pieces),
        hidden=max(piece.hidden for piece in pieces),
        on_host=in_flight * max(piece.offloaded for piece in pieces),
        optimizer_on_host=of_all("optimizer_on_host"),
        link=simulation.gpu.link_a_second,
        sent=2 * of_all("hidden") * micro_batches if stage < stages - 1 or len(pieces) > 1 else 0,
    )


def step(stages: Sequence[StageMemory], micro_batches: int) -> Timeline:
    """Return the timeline of a step: its schedule, simulated with the times of the pieces.

    Args:
        stages: The stages of a split, in order.
        micro_batches: Micro-batches per step.
    """
    virtual_stages = len(stages[0].piece_seconds)
    times = [stages[k % len(stages)].piece_seconds[k // len(stages)] for k in range(len(stages) * virtual_stages)]
    return simulate(
        interleaved_1f1b(len(stages), virtual_stages, micro_batches),
        [(1 - BACKWARD) * time + PASS for time in times],
        [BACKWARD * time + PASS for time in times],
        max(stage.hidden for stage in stages) / stages[0].link,
    )
