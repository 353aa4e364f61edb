"""Draws how documents fill sequences in both ways of packing, as the data module's own code lays them out.

python docs/pictures/packing.py [OUTPUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

from lightning_pipelite.data.packing import Layout, best_fit, lay_out

mpl.use("Agg")
import matplotlib.pyplot as plt

LENGTHS = np.array([300, 560, 210, 420, 150, 700, 260, 90, 330, 330])
CAPACITY = 1024


def main() -> None:
    output = sys.argv[1] if sys.argv[1:] else Path(__file__).with_suffix(".svg")
    groups = [np.arange(len(LENGTHS))]
    layouts = {
        "packing: concatenate": lay_out(groups, LENGTHS, CAPACITY, drop_tails=False, max_sequences=None),
        "packing: best_fit": best_fit(groups, LENGTHS, CAPACITY, max_sequences=None, seed=0),
    }
    plt.rcParams["svg.hashsalt"] = "pipelite"
    figure, both = plt.subplots(2, 1, figsize=(11, 4.6), layout="constrained", sharex=True)
    for axes, (title, layout) in zip(both, layouts.items(), strict=True):
        draw(axes, title, layout)
    both[1].set_xlabel("position in the sequence")
    figure.savefig(output, metadata={"Date": None})


def draw(axes: plt.Axes, title: str, layout: Layout) -> None:
    colours = plt.colormaps["tab10"]
    for document, source, start, size in zip(
        layout.documents, layout.sources, layout.starts, layout.sizes, strict=True
    ):
        sequence, left = divmod(int(start), CAPACITY)
        split = "…" if source else ""
        axes.barh(sequence, size, left=left, color=colours(int(document)), alpha=0.8, edgecolor="white", height=0.85)
        label = f"{split}{document + 1}" + ("…" if source + size < LENGTHS[document] else "")
        axes.text(left + size / 2, sequence, label, ha="center", va="center", fontsize=9)
    padding = layout.sequences * CAPACITY - int(layout.sizes.sum())
    axes.set_yticks(range(layout.sequences), [f"sequence {number + 1}" for number in range(layout.sequences)])
    axes.set_xlim(0, CAPACITY)
    axes.set_facecolor("#eeeeee")
    axes.invert_yaxis()
    told = f"{title}: {padding} of {layout.sequences * CAPACITY} positions are padding (grey)"
    axes.set_title(told, fontsize=10, loc="left")
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
