"""Predicted against measured memory of training on one GPU, for models, adapters, lengths and policies.

    python benchmarks/plan_memory.py [--only NUMBER,...] [--shape tiny] [--write]

Each job trains three steps of two micro-batches through the Trainer: a Llama of random bf16 weights in one stage, with
four documents in each sequence. Predicted is what ``pipelite plan`` says in advance. Measured is the peak of torch's
allocated memory (``torch.cuda.max_memory_allocated``) from the second step on, when the optimizer's state exists. Next
to it is all memory taken from the GPU, including CUDA's context and the unused part of torch's cache: the plan calls it
total, and it decides whether a training fits.

Exits with 1 if a prediction of the allocated memory is more than 7 % too high or more than 3 % too low.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_pipelite import PipeLiteModule
from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.simulation import Simulation
from random_model import SHAPES, random_sequences, write_model
from report import Report
from step_loops import one_stage_trainer

STEPS, MICRO_BATCHES, DOCUMENTS, RANK = 3, 2, 4, 16
ABOVE, BELOW = 0.07, 0.03


@dataclass(frozen=True)
class Job:
    """What is trained."""

    shape: str
    adapter: str
    length: int
    policy: str


JOBS = [
    Job("1b", "full", 4096, "keep"),
    Job("1b", "full", 4096, "recompute"),
    Job("1b", "full", 4096, "offload"),
    Job("1b", "LoRA", 8192, "keep"),
    Job("1b", "LoRA", 32768, "recompute"),
    Job("1b", "QLoRA", 8192, "selective"),
    Job("1b", "QLoRA", 8192, "offload"),
    Job("8b", "LoRA", 4096, "keep"),
    Job("8b", "LoRA", 4096, "recompute"),
    Job("8b", "QLoRA", 2048, "selective"),
    Job("8b", "QLoRA", 16384, "recompute"),
    Job("8b", "QLoRA", 16384, "offload"),
]


class Peak(L.Callback):
    """The peak of allocated memory after the first step, and all memory taken from the GPU, in bytes."""

    allocated = taken = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1 and trainer.fit_loop.epoch_loop.batch_idx == MICRO_BATCHES - 1:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # left from compilation
            torch.cuda.reset_peak_memory_stats()
        elif trainer.global_step == STEPS:
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            self.allocated, self.taken = torch.cuda.max_memory_allocated(), total - free


def measure(job: Job, directory: str) -> tuple[Any, int, int]:
    """Return the plan of the job's stage, the peak of allocated memory, and all memory taken from the GPU."""
    module = PipeLiteModule(
        directory,
        Full() if job.adapter == "full" else LoRA(RANK),
        load_in_4bit=job.adapter == "QLoRA",
        schedule="constant",
        activation_memory=job.policy,  # type: ignore[arg-type]
    )
    layers, loss = module.pipeline_layers()
    simulation = Simulation(layers, loss, lambda parameters: module.optimizer_factory(parameters, 1e-3))
    planner = Planner(simulation, micro_batches=MICRO_BATCHES, sequence_len=job.length)
    (planned,) = planner.stages([0, len(layers)], job.policy)
    peak = Peak()
    trainer = one_stage_trainer(peak, STEPS, MICRO_BATCHES)
    vocabulary = SHAPES[job.shape]["vocab_size"]
    data = random_sequences(STEPS * MICRO_BATCHES, job.length, vocabulary, DOCUMENTS)
    trainer.fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return planned, peak.allocated, peak.taken  # not the callback, through which Lightning keeps the module alive


def main() -> int:
    """Measure the jobs, print the table, and return 1 if a prediction is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="numbers of jobs, from 0, with commas between them")
    parser.add_argument("--shape", choices=list(SHAPES), help="in place of each job's own, to try this out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/plan_memory.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("plan_memory.py needs a GPU")
    chosen = JOBS if options.only is None else [JOBS[int(number)] for number in options.only.split(",")]
    report = Report(
        "plan_memory",
        "| model | trained | tokens | activation_memory | predicted GiB | measured GiB | off by | total predicted "
        "| total taken | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    wrong = 0
    gib = 2**30
    with tempfile.TemporaryDirectory() as temporary:
        for job in chosen:
            began = time.perf_counter()
            shape = options.shape or job.shape
            directory = Path(temporary) / shape
            if not directory.exists():
                write_model(directory, shape, torch.device("cuda"))
                free()
            try:
                planned, allocated, taken = measure(Job(shape, job.adapter, job.length, job.policy), str(directory))
            except Exception as error:  # run the other jobs all the same
                wrong += 1
                report.row(f"| {shape} | {job.adapter} | {job.length} | {job.policy} | {type(error).__name__}: "
                           f"{str(error).splitlines()[0][:120] if str(error) else ''} |")  # fmt: skip
                free()
                continue
            free()
            off = planned.peak / allocated - 1
            wrong += not -BELOW <= off <= ABOVE
            report.row(
                f"| {shape} | {job.adapter} | {job.length} | {job.policy} | {planned.peak / gib:.2f} "
                f"| {allocated / gib:.2f} | {off:+.1%} | {planned.total / gib:.2f} | {taken / gib:.2f} "
                f"| {time.perf_counter() - began:.0f} |"
            )
            print(f"  weights {planned.weights / gib:.3f} gradients {planned.gradients / gib:.3f} optimizer "
                  f"{planned.optimizer / gib:.3f} activations {planned.activations / gib:.3f} transient "
                  f"{planned.transient / gib:.3f} loss {planned.loss / gib:.3f}", flush=True)  # fmt: skip
    report.line(f"{len(chosen)} jobs, {wrong} off by more than {ABOVE:.0%}, or too low by more than {BELOW:.0%}.")
    if options.write:
        report.write()
    return int(wrong > 0)


def free() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
