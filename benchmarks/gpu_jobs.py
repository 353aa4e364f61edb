"""LoRA and QLoRA on a GPU with a Llama of more than a billion random weights, in one stage and in two over NCCL.

    python benchmarks/gpu_jobs.py [--steps 16] [--write]

bf16 weights with fp32 adapters. Two stages are compared with one stage, and one stage with a plain loop of transformers
+ PEFT, by the loss of every step. A few sequences are repeated, so that the loss falls. Two stages share the first GPU,
which NCCL supports from 2.30 with NCCL_MULTI_RANK_GPU_ENABLE=1.

Exits with 1 if a loss differs by more than 1e-2, or if a job's loss falls by less than 0.1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import tests_support  # noqa: F401
from exact_comparison import differences
from exact_training import Case, Scale, Split, make_model, train_plain, train_split
from processes import Workers
from report import Report

LIMIT = 1e-2
SCALE = Scale(vocabulary=32_000, hidden=2048, layers=16, sequence=1024, sequences=11, dtype="bfloat16", gpu=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpu_jobs.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_jobs.py needs a GPU")
    workers = Workers(2, one_gpu=True)
    report = Report(
        "gpu_jobs", "| job | compared with | loss, first to last | largest difference |", "| --- | --- | --- | --- |"
    )
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        parameters = make_model(Path(directory), Case("Llama"), SCALE)
        torch.cuda.empty_cache()
        for case in (Case("LoRA, all layers"), Case("LoRA, 4-bit base", in_4bit=True)):
            compared = workers.run(1, train_plain, case, directory, arguments.steps, SCALE)[0], "transformers + PEFT"
            for stages in (1, 2):
                ours = workers.run(stages, train_split, case, Split(stages), directory, arguments.steps, SCALE)[0]
                loss, _ = differences(ours, compared[0])
                losses = ours[0]
                failed |= not (loss <= LIMIT and losses[-1] < losses[0] - 0.1)
                name = f"{case.name}, {stages} stage{'s' * (stages > 1)}"
                report.row(f"| {name} | {compared[1]} | {losses[0]:.4f} to {losses[-1]:.4f} | {loss:.1e} |")
                compared = (ours, "one stage") if stages == 1 else compared
    workers.close()
    verdict = "FAILED" if failed else "all within"
    report.line(f"{parameters / 1e9:.2f} billion parameters, {arguments.steps} steps; limit {LIMIT:.0e}: {verdict}")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
