"""A training step through the Trainer, against a bare loop over the same layers and against transformers + PEFT.

    python benchmarks/step.py [--jobs NAME,...] [--steps 20] [--shape 8b|1b|qwen3-moe|gpt-oss|mixtral|tiny|...]
                              [--loops NAME,...] [--write]

On one GPU, random bf16 weights in the shape of a Llama or of a mixture of experts, sequences of 4096 tokens (one
document each, the most work), 4 micro-batches a step, rank 16 in float32 on all linear layers and experts. Each job
names the loops that train it, from the same values over the same tokens:

- *Trainer*: PipeLiteModule under PipeLiteStrategy, one stage.
- *bare loop*: the same stage, loss and optimizer without Lightning and DeepSpeed.
- *transformers + PEFT*: their model and forward, recomputed layers, the same optimizer (LoRA and QLoRA).
- *float32*: the same in float32, products in tf32: for mixtures, the reference for the others' losses. In bf16, PEFT
  adds B·A to the experts' weights, whose rounding removes most of a small B·A.
- *Unsloth*, where it is installed: its model and recomputation, the same optimizer, but its own random initial values.

Tokens/s are those of the median step after three of warm-up, from the end of one to the end of the next; memory is the
peak of torch's allocated memory. MFU counts the operations that the model needs, without recomputation (4
floating-point operations a token for each frozen weight outside the embedding, of the experts only those that a token
is routed to; 6 for a trained one; and causal attention), over 989 TFLOP/s, an H100's dense bf16 rate in its data sheet.

Exits with 1 if a loss of the Trainer's differs from another loop's by more than 2e-2 (for mixtures, from the bare
loop's or float32's), or if a limit is missed; the limits include the Trainer's time against the bare loop's and, where
both jobs ran, offload's against recompute's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from random_model import SHAPES, has_experts, write_model
from report import Report
from step_jobs import BARE, EXPERT_JOBS, FLOAT32, JOBS, TRAINER, UNSLOTH, WHOLE, mfu
from step_loops import LOOPS, WARM_UP, Run, device, free
from unsloth_step import is_installed

LOSS_LIMIT, OVERHEAD_LIMIT, OFFLOAD_LIMIT = 2e-2, 1.02, 1.03


def compared(speeds: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], tuple[str, str], float]]:
    """Yield two runs, each a job and a loop, and the limit of the first one's time over the second one's."""
    runs = set(speeds)
    pairs = [((job, TRAINER), (job, BARE), OVERHEAD_LIMIT) for job in JOBS | EXPERT_JOBS]
    pairs.append((("lora-little", TRAINER), ("lora-recompute", TRAINER), OFFLOAD_LIMIT))
    yield from (pair for pair in pairs if runs.issuperset(pair[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", help="default: all jobs for the shape")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--loops", help=f"a subset of {', '.join(LOOPS)}; default: all loops of each job")
    parser.add_argument("--profile", type=Path, help="write profiles of a step of the Trainer's to this folder")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/step.md, or step_SHAPE.md")
    arguments = parser.parse_args()
    chosen = arguments.loops.split(",") if arguments.loops else list(LOOPS)
    if unknown := set(chosen) - set(LOOPS):
        parser.error(f"--loops: unknown {', '.join(unknown)}; choose from {', '.join(LOOPS)}")
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps: give more than the {WARM_UP} of warm-up")
    jobs = EXPERT_JOBS if has_experts(arguments.shape) else JOBS
    fitting = [name for name, job in jobs.items() if (job.limited == WHOLE) == (arguments.shape == WHOLE)]
    names = arguments.jobs.split(",") if arguments.jobs else fitting
    if unknown := set(names) - set(jobs):
        parser.error(f"--jobs: unknown {', '.join(unknown)}; with this shape, choose from {', '.join(jobs)}")
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    report = Report(
        f"step_{arguments.shape}" if has_experts(arguments.shape) else "step",
        "| job | activations | loop | tokens/s | MFU | peak GiB | loss, first to last | largest difference | limits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    failed = False
    speeds: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name in names:
            job = jobs[name]
            shape = job.shape if job.shape and not arguments.shape.startswith("tiny") else arguments.shape
            directory = Path(folder) / shape
            if not directory.exists():
                write_model(directory, shape, device())
            ours: Run | None = None
            for loop in job.loops:
                if loop not in chosen or (loop == UNSLOTH and not is_installed()):
                    continue
                free()
                profiled = {"profiled": arguments.profile / f"{name}.txt"} if arguments.profile else {}
                run = LOOPS[loop](job, shape, str(directory), arguments.steps, **(profiled if loop == TRAINER else {}))
                speed = speeds[name, loop] = run.tokens_per_s(shape)
                difference, limits = "", ""
                if ours is None:
                    ours = run
                    if torch.cuda.is_available() and shape == job.limited and job.tokens_per_s:
                        held = speed >= job.tokens_per_s and run.gib <= job.gib
                        failed |= not held
                        limits = f"{job.tokens_per_s:,.0f}, {job.gib:g} GiB: {'held' if held else 'FAILED'}"
                else:
                    most = max(abs(a - b) for a, b in zip(run.losses, ours.losses, strict=True))
                    if not has_experts(shape) or loop in (BARE, FLOAT32):
                        failed |= not most <= LOSS_LIMIT
                    difference = f"{most:.1e}"
                report.row(
                    f"| {name} ({shape}) | {job.memory} | {loop} | {speed:,.0f} | {100 * mfu(job, shape, speed):.1f} % "
                    f"| {run.gib:.2f} | {run.losses[0]:.4f} to {run.losses[-1]:.4f} | {difference} | {limits} |"
                )
    for one, other, limit in compared(speeds):
        ratio = speeds[other] / speeds[one]
        failed |= torch.cuda.is_available() and not ratio <= limit
        names = [f"{job}, {loop}" for job, loop in (one, other)]
        report.line(f"{names[0]}: {ratio:.3f} times as long as {names[1]} (limit {limit})")
    report.line(f"{arguments.steps} steps; {'FAILED' if failed else 'all within their limits'}")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
