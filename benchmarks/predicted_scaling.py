"""What scaling.py should find on more GPUs than were available, predicted from times measured on one.

    python benchmarks/predicted_scaling.py [RESULT] [--shape 8b] [--stages 2,4,8] [--virtual-stages 1,2,4]
        [--micro-batches 4,8,16,32] [--write]

RESULT is a table of scaling.py: the times of a layer, of the ends and of a transfer are read from it, the layers are
cut by these times, and the schedule is simulated with them. *Efficiency* is tokens/s over those of the same number of
single cards, *ideal* is that of equal pieces, m/(m+(p-1)/V). Transfers overlap computation with several pieces a stage,
and block both ends with one; what transfers, and waiting for them, take from the GPU's processors is not modelled. Nor
are replicas: each does what a single pipeline does, apart from the all-reduce of the adapters' gradients.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import tests_support  # noqa: F401
from layer_times import LayerTimes
from random_model import SHAPES
from report import RESULTS, Report
from schedule_simulation import Stage

PAIR = r"([0-9.]+) \+ ([0-9.]+) ms"
LINE = re.compile(
    rf"^(\w+) \(\w+\): forward \+ backward of a layer {PAIR}, before {PAIR}, after {PAIR}; a transfer ([0-9.]+) ms",
    re.MULTILINE,
)


def main() -> None:
    def listed(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, default=RESULTS / "scaling_2_gpus_virtual.md")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--stages", type=listed, default=[2, 4, 8])
    parser.add_argument("--virtual-stages", type=listed, default=[1, 2, 4])
    parser.add_argument("--micro-batches", type=listed, default=[4, 8, 16, 32])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/predicted_scaling.md")
    options = parser.parse_args()
    found = LINE.findall(options.result.read_text(encoding="utf-8"))
    if not found:
        sys.exit(f"{options.result} has no line with the times of a layer; give a table that scaling.py has written.")
    report = Report(
        "predicted_scaling",
        "| way | stages | V | " + " | ".join(f"m = {m}" for m in options.micro_batches) + " |",
        "| --- | --- | --- |" + " --- |" * len(options.micro_batches),
    )
    layers = SHAPES[options.shape]["num_hidden_layers"]
    for way, *numbers in found:
        *pairs, transfer = (float(number) / 1000 for number in numbers)
        times = LayerTimes(*(Stage(*pairs[at : at + 2]) for at in (0, 2, 4)))
        for stages in options.stages:
            for pieces in options.virtual_stages:
                cells = []
                for micro_batches in options.micro_batches:
                    bounds = times.bounds(layers, stages, pieces, micro_batches, balanced=True)
                    efficiency = times.efficiency(bounds, stages, micro_batches, transfer)
                    cells.append(
                        f"{efficiency:.2f} (ideal {micro_batches / (micro_batches + (stages - 1) / pieces):.2f})"
                    )
                report.row(f"| {way} ({options.shape}) | {stages} | {pieces} | {' | '.join(cells)} |")
    report.line(f"Predicted efficiency, from the times in {options.result.name}; cut by these times.")
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
