"""Training through the pipeline against a plain loop over the unsplit model.

    python benchmarks/exactness.py [--steps 20] [--write]

For each way to train, number of stages, virtual stages and replicas, and layout of the ranks: the largest difference in
the loss of any step and in the final weights (relative, in the 2-norm, the worst tensor) from a loop in plain torch
without Lightning or DeepSpeed; for LoRA, that loop is transformers + PEFT. Float32 on CPUs over gloo, with clipped
gradients, unequally masked tokens, packed documents, and a last batch that is short and not divisible by the replicas.
Where a difference exceeds its limit and rounding alone decided a router's choice in that loop, other data are drawn,
four times at most.

Exits with 1 if a difference exceeds its limit: 1e-5 (losses), 1e-4 (weights).
"""

from __future__ import annotations

import argparse
import itertools
import sys

import tests_support  # noqa: F401
from exact_comparison import compare
from exact_training import CASES, LOSS_LIMIT, WEIGHT_LIMIT, Scale, Split
from processes import Workers
from report import Report

SPLITS = tuple(
    Split(stages, replicas, column_major)
    for stages, replicas, column_major in itertools.product((1, 2, 4), (1, 2), (False, True))
    if not column_major or (stages > 1 and replicas > 1)
)
VIRTUAL_SPLITS = {  # by the number of layers, at least one for each piece
    8: (
        *(Split(2, replicas, False, pieces) for pieces, replicas in itertools.product((2, 4), (1, 2))),
        Split(2, 2, True, 2),
        *(Split(4, replicas, column_major, 2) for replicas, column_major in ((1, False), (2, False), (2, True))),
    ),
    16: (Split(4, 1, False, 4), Split(4, 2, True, 4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/exactness.md")
    arguments = parser.parse_args()
    workers = Workers(8)
    report = Report("exactness", "| training | stages x replicas | loss | weights |", "| --- | --- | --- | --- |")
    failed = False
    for case, (layers, splits) in itertools.product(CASES, {Scale().layers: SPLITS, **VIRTUAL_SPLITS}.items()):
        for split, loss, weight in compare(workers, case, splits, arguments.steps, Scale(layers=layers)):
            report.row(f"| {case.name} | {split} | {loss:.1e} | {weight:.1e} |")
            failed |= not (loss <= LOSS_LIMIT and weight <= WEIGHT_LIMIT)
    workers.close()
    report.line(f"{arguments.steps} steps; limits {LOSS_LIMIT:.0e} (losses), {WEIGHT_LIMIT:.0e} (weights): "
                f"{'EXCEEDED THE LIMITS' if failed else 'all within'}")  # fmt: skip
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
