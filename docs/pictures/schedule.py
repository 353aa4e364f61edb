"""Draws the pipeline's schedule: which stage does what, when. DeepSpeed's own TrainSchedule is asked for the order.

python docs/pictures/schedule.py [OUTPUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

mpl.use("Agg")
import matplotlib.pyplot as plt

STAGES, MICRO_BATCHES = 4, 8
DURATION = {"F": 1.0, "B": 2.0}  # a backward pass does two matrix products for each one of the forward pass
COLOUR = {"F": "#5e8bd1", "B": "#e0a04a"}


def orders() -> list[list[tuple[str, int]]]:
    """What each stage runs in order: forward or backward, and the number of the micro-batch."""
    found = []
    for stage in range(STAGES):
        passes: list[tuple[str, int]] = []
        counts = {"F": 0, "B": 0}
        for commands in TrainSchedule(MICRO_BATCHES, STAGES, stage).steps():
            for command in commands:
                kind = {ForwardPass: "F", BackwardPass: "B"}.get(type(command))
                if kind:
                    passes.append((kind, counts[kind]))
                    counts[kind] += 1
        found.append(passes)
    return found


def ends(order: list[list[tuple[str, int]]]) -> dict[tuple[int, str, int], float]:
    """When each pass ends, if it starts as soon as the stage is free and what it needs has arrived."""
    end: dict[tuple[int, str, int], float] = {}
    waiting = [list(passes) for passes in order]
    free = [0.0] * STAGES
    while any(waiting):
        for stage, passes in enumerate(waiting):
            if not passes:
                continue
            kind, number = passes[0]
            neighbour = stage - 1 if kind == "F" else stage + 1
            needed = (neighbour, kind, number)
            if 0 <= neighbour < STAGES and needed not in end:
                continue
            free[stage] = max(free[stage], end.get(needed, 0.0)) + DURATION[kind]
            end[stage, kind, number] = free[stage]
            passes.pop(0)
    return end


def main() -> None:
    output = sys.argv[1] if sys.argv[1:] else Path(__file__).with_suffix(".svg")
    end = ends(orders())
    total = max(end.values())
    idle = 1 - MICRO_BATCHES * sum(DURATION.values()) / total
    plt.rcParams["svg.hashsalt"] = "pipelite"
    figure, axes = plt.subplots(figsize=(11, 2.9), layout="constrained")
    for (stage, kind, number), until in end.items():
        width = DURATION[kind]
        axes.barh(stage, width, left=until - width, color=COLOUR[kind], edgecolor="white", height=0.92)
        axes.text(until - width / 2, stage, str(number + 1), ha="center", va="center", fontsize=9, color="#1a1a1a")
    axes.set_yticks(range(STAGES), [f"stage {stage}" for stage in range(STAGES)])
    axes.set_facecolor("#eeeeee")
    axes.set_xlim(0, total)
    axes.invert_yaxis()
    axes.set_xlabel("time, in forward passes of a stage")
    axes.set_title(
        f"One step of {MICRO_BATCHES} micro-batches in {STAGES} stages: forward (blue), backward (orange); "
        f"{idle:.0%} of the time is idle (grey)",
        fontsize=10,
        loc="left",
    )
    axes.spines[:].set_visible(False)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
