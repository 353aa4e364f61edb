"""Draws the stages of a plan as bars."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lightning_pipelite.planning.report import Report
from lightning_pipelite.planning.stage_table import GIB, KINDS


def draw(report: Report, path: Path) -> None:
    """Draw into a PNG file what each stage holds, as one bar, and the memory of its device."""
    stages = report.shown
    figure = Figure(figsize=(6.75, 1.4 + 0.4 * len(stages)), layout="constrained")
    axes = figure.add_subplot()
    rows = [f"stage {number}" for number in range(len(stages))]
    left = [0.0] * len(stages)
    for name, (_, label) in KINDS.items():
        widths = [getattr(stage, name) / GIB for stage in stages]
        axes.barh(rows, widths, left=left, label=label, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for number, size in enumerate(report.planner.devices.memory_of_stages(len(stages))):
        (line,) = axes.plot([size / GIB] * 2, [number - 0.5, number + 0.5], color="black", linestyle="--", linewidth=1)
        line.set_label("device" if number == 0 else "_")  # one of them in the legend
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.set_title(
        f"activation_memory {report.shown_policy}, sequences of {report.planner.sequence_len} tokens", fontsize=9
    )
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35 if len(stages) > 2 else -0.6))
    figure.savefig(path, dpi=150)
