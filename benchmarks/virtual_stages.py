"""The step of a pipeline with one, two and four pieces on each stage: the schedule alone, over gloo.

    python benchmarks/virtual_stages.py [--stages 4] [--layer-ms 30] [--steps 4] [--write]

The layers compute next to nothing but sleep, 30 ms forward and twice that backward, so that ranks that share few cores
run at full speed. This compares the schedules with their transfers. *Efficiency* is the layers' time over the step's
time and the number of stages, *ideal* is that of equal pieces, m/(m+(p-1)/V).

Exits with 1 if two pieces a stage are less than 1.15 times as fast as one with as many micro-batches as stages, or if a
loss differs.
"""

from __future__ import annotations

import argparse
import sys

import tests_support  # noqa: F401
from processes import Workers
from report import Report
from sleeping import train

PIECES, GAIN = (1, 2, 4), 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--layer-ms", type=float, default=30.0, help="forward; backward takes twice that")
    parser.add_argument("--steps", type=int, default=4, help="number of timed steps")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/virtual_stages.md")
    options = parser.parse_args()
    stages, layers, seconds = options.stages, options.stages * max(PIECES), options.layer_ms / 1000
    workers = Workers(stages)
    head = "| micro-batches | pieces a stage | step, s | as fast as one piece | efficiency | ideal |"
    report, failed = Report("virtual_stages", head, "| --- | --- | --- | --- | --- | --- |"), False
    for micro_batches in (stages, 2 * stages):
        alone, expected = 0.0, []
        for pieces in PIECES:
            found = workers.run(stages, train, stages, pieces, layers, micro_batches, seconds, options.steps)
            step, losses = max(each for each, _ in found), found[0][1]
            if pieces == 1:
                alone, expected = step, losses
            failed |= max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > 1e-6
            failed |= pieces == 2 and micro_batches == stages and alone / step < GAIN
            efficiency = 3 * seconds * layers * micro_batches / (stages * step)
            ideal = micro_batches / (micro_batches + (stages - 1) / pieces)
            report.row(
                f"| {micro_batches} | {pieces} | {step:.3f} | {alone / step:.2f} | {efficiency:.2f} | {ideal:.2f} |"
            )
    workers.close()
    report.line(
        f"{stages} ranks over gloo, {layers} layers that sleep {options.layer_ms:g} ms forward and twice that back; "
        f"{'FAILED' if failed else f'two pieces are at least {GAIN} times as fast as one at m = {stages}'}"
    )
    if options.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
