"""How well `partition_method: auto` cuts for ranks of unequal speed, against every possible cut; over gloo.

    python benchmarks/unequal.py [--speeds 1,0.5] [--layers 12] [--layer-ms 10] [--micro-batches 8] [--steps 3]
                                 [--write]

The layers sleep instead of computing (in backward twice as long as in forward, on a rank of speed 0.5 twice as long),
so that ranks that share few cores run at full speed.

Exits with 1 if the best cut's step takes less than 0.93 of the time of auto's, or if a loss differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import tests_support  # noqa: F401
from processes import Workers
from report import Report
from sleeping import train

LIMIT = 0.93


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speeds", default="1,0.5", help="of each rank")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--layer-ms", type=float, default=10.0, help="forward on a rank of speed 1")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/unequal.md")
    options = parser.parse_args()
    speeds = [float(speed) for speed in options.speeds.split(",")]
    stages, layers = len(speeds), options.layers
    cuts = [(0, *inner, layers) for inner in itertools.combinations(range(1, layers), stages - 1)]
    methods = ["layers:" + ",".join(str(b - a) for a, b in itertools.pairwise(cut)) for cut in cuts]
    workers = Workers(stages)
    report = Report("unequal", "| partition_method | step, s |", "| --- | --- |")
    times, losses = {}, {}
    for method in ("auto", *methods):
        job = (stages, 1, layers, options.micro_batches, options.layer_ms / 1000, options.steps, method, speeds)
        found = workers.run(stages, train, *job)
        times[method], losses[method] = max(step for step, _ in found), found[0][1]
        report.row(f"| {method} | {times[method]:.3f} |")
    workers.close()
    best = min(methods, key=lambda method: times[method])
    share = times[best] / times["auto"]
    differ = max(abs(a - b) for each in losses.values() for a, b in zip(each, losses["auto"], strict=True)) > 1e-6
    failed = share < LIMIT or differ
    report.line(
        f"{stages} ranks over gloo of speeds {options.speeds}, {layers} layers that sleep {options.layer_ms:g} ms "
        f"forward; the best is {best}, auto reaches {share:.3f} of it: {'FAILED' if failed else 'passed'}"
    )
    if options.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
