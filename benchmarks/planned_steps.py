"""The peak memory that a plan predicts for the jobs of benchmarks/step.py, beside what they took on a GPU.

    python benchmarks/planned_steps.py [--write]

Reads the Trainer's rows of benchmarks/results/step*.md, and plans each job for that GPU, from config.json alone, on the
CPU. For Llamas, benchmarks/plan_memory.py compares more policies and lengths; these jobs add mixtures of experts and
weights in FP8.

Exits with 1 if a plan is more than 7 % too high or more than 3 % too low, the share that is kept free.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optimi import Adam
from transformers import AutoConfig

from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.optim.offloaded import offload_state
from lightning_pipelite.planning.gpus import GPUS
from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.simulation import Simulation
from plan_memory import ABOVE, BELOW
from random_model import SHAPES, facts_of
from report import RESULTS, Report
from step_jobs import EXPERT_JOBS, JOBS, MICRO_BATCHES, make_adapter

ROW = re.compile(r"^\| ([\w-]+) \(([\w-]+)\) \| \w+ \| Trainer \|(?:[^|]*\|){2} ([0-9.]+) \|", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/planned_steps.md")
    arguments = parser.parse_args()
    report = Report(
        "planned_steps",
        "| job | in | predicted GiB | measured GiB | off by |",
        "| --- | --- | --- | --- | --- |",
    )
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for page in sorted(RESULTS.glob("step*.md")):
            text = page.read_text(encoding="utf-8")
            gpu = next(name for name in GPUS if f"NVIDIA {name.upper()}" in text)
            newest: dict[tuple[str, str], float] = {}
            for name, shape, gib in ROW.findall(text):
                newest.setdefault((name, shape), float(gib))  # a page begins with its newest table
            for (name, shape), gib in newest.items():
                predicted = planned(name, shape, gpu, Path(folder) / shape)
                off = predicted / gib - 1
                failed += not -BELOW <= off <= ABOVE
                report.row(f"| {name} ({shape}) | {page.name} | {predicted:.2f} | {gib:.2f} | {off:+.1%} |")
    report.line(f"{failed} off by more than {ABOVE:.0%}, or too low by more than {BELOW:.0%}.")
    if arguments.write:
        report.write()
    sys.exit(failed > 0)


def planned(name: str, shape: str, gpu: str, directory: Path) -> float:
    """Return the GiB that torch will have allocated at the peak of a job."""
    job = (JOBS | EXPERT_JOBS)[name]
    if not directory.exists():
        AutoConfig.for_model(**facts_of(shape)).save_pretrained(directory)
    layers = CausalLMLayers(
        directory, dtype=torch.bfloat16, adapter=make_adapter(job.adapter), load_in_4bit=job.in_4bit,
        load_in_fp8=job.in_fp8, fp8_transpose_cache=job.transpose_cache, bnb_4bit_use_double_quant=job.saving,
        fuse_head=True, needs_weights=False,
    )  # fmt: skip
    layers.planned_fp8 = GPUS[gpu].fp8 is not None
    optimizer: Any = partial(Adam, lr=1e-3)
    if job.saving:
        optimizer = offload_state(optimizer)
    simulation = Simulation(layers, CausalLMLoss(), optimizer, GPUS[gpu])
    length = SHAPES[shape]["max_position_embeddings"]
    planner = Planner(simulation, micro_batches=MICRO_BATCHES, sequence_len=length)
    (stage,) = planner.stages([0, len(layers)], job.memory)
    return stage.peak / 2**30


if __name__ == "__main__":
    main()
