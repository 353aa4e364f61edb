"""Draws what a Control Adapter does to what a layer adds, in the plane of two of its directions.

python docs/pictures/control_adapter.py [OUTPUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import torch

from lightning_pipelite.kernels.control import control_reference

mpl.use("Agg")
import matplotlib.pyplot as plt

S = torch.tensor([0.8, -0.5])
TITLES = {1: "class +1: more of it", 0: "class 0: as the base model", -1: "class -1: less of it"}


def changed(delta: torch.Tensor, control_class: int) -> torch.Tensor:
    """What the adapter makes of what a layer adds, [points, 2], with the columns of Q along the axes."""
    return control_reference(delta, delta, torch.eye(2), S, torch.full(delta.shape[:1], control_class))


def main() -> None:
    output = sys.argv[1] if sys.argv[1:] else Path(__file__).with_suffix(".svg")
    turn = torch.linspace(0, 2 * torch.pi, 25)
    circle = torch.stack([turn.cos(), turn.sin()], dim=1)
    plt.rcParams["svg.hashsalt"] = "pipelite"
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained", sharex=True, sharey=True)
    for axes, (control_class, title) in zip(all_axes, TITLES.items(), strict=True):
        after = changed(circle, control_class)
        axes.plot(*circle.T, color="#999999", linewidth=1, linestyle="--")
        axes.plot(*after.T, color="#7e57c2", linewidth=2)
        for before, moved in zip(circle[::3], after[::3], strict=True):
            axes.annotate("", moved.tolist(), before.tolist(), arrowprops={"arrowstyle": "->", "color": "#e0a04a"})
        axes.set_title(title, fontsize=10)
        axes.set_aspect("equal")
        axes.axhline(0, color="#dddddd", zorder=0)
        axes.axvline(0, color="#dddddd", zorder=0)
        axes.set_xlabel(f"along column 1 of Q (times {float((control_class * S[0]).exp()):.2f})")
        axes.spines[:].set_visible(False)
    all_axes[0].set_ylabel("along column 2 of Q, times exp(c·S₂)")
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
