"""gpt-oss-20b from its MXFP4 files, in 4 bits on one GPU: memory, speed, and the time to its first step.

    python benchmarks/mxfp4.py [--layers 24] [--steps 10] [--tiny] [--write]

Writes the shape with random weights, once with its experts in MXFP4 as shipped, once with the same values in bf16, and
trains each with load_in_4bit and a LoRA of rank 16 on attention and experts through the Trainer, in a fresh process as
a user would: sequences of 4096 tokens, 4 micro-batches a step, layers recomputed. The files are in memory (/dev/shm) if
there is room, else on a disk, and have just been written, so that both are read from memory. Each process compiles all
of its kernels anew. MXFP4 runs first, and reads the libraries from disk if nothing has before.

The time to the first step runs from before the process starts until the first loss and step are done. It is reported in
phases: imports; PipeLiteModule, which checks the files and tries the model class; the Trainer's start, up to the
loading of weights; loading; the step, and how much longer it takes than a later one, which is compilation.

Only one format's files exist at a time, up to 43 GB; where that is too much, ``--layers`` compares fewer layers of
both.

Exits with 1 if a loss of the two differs by more than 2e-2; on a GPU also if the training from MXFP4 takes more than 20
GiB at its peak, loading included (torch's allocated memory), or if its first step takes more than 1.5 times as long as
that from bf16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import tests_support  # noqa: F401
from random_model import SHAPES
from random_mxfp4 import write_gpt_oss
from report import Report
from step_jobs import MICRO_BATCHES, Job, mfu, micro_batches
from step_loops import WARM_UP, Run, Timing, device, make_module, one_stage_trainer, peak_gib

JOB = Job("LoRA", "recompute", in_4bit=True, gib=20)
WHOLE, TINY = "gpt-oss-24", "tiny-gpt-oss"
FORMATS = ("MXFP4", "bf16")
STEPS_OF_BF16 = 2  # only the end of its first step matters
TIMES_LIMIT, LOSS_LIMIT = 1.5, 2e-2
BYTES_OF_A_LAYER, BYTES_OF_ENDS = 1.7e9, 2.4e9  # in bf16


class Phases(Timing):
    """Also records when the phases of the start end."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps, None)
        self.ended: dict[str, float] = {}

    def setup(self, *_: Any, **__: Any) -> None:
        self.ended["Trainer"] = time.time()

    def on_fit_start(self, *_: Any) -> None:
        self.ended["loading"] = time.time()

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        if self.ends and "first step" not in self.ended:
            self.ended["first step"] = time.time()


def train(directory: str, shape: str, steps: int, began: float) -> dict[str, Any]:
    """Train in this process, which was started at ``began``, and return the measurements."""
    ended = {"imports": time.time()}
    phases = Phases(steps)
    module = make_module(JOB, directory)
    ended["PipeLiteModule"] = time.time()
    trainer = one_stage_trainer(phases, steps, MICRO_BATCHES)
    batches: Any = DataLoader(micro_batches(shape, steps, module.adapter), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, batches)
    ended |= phases.ended
    took = dict(zip(ended, (b - a for a, b in itertools.pairwise([began, *ended.values()])), strict=True))
    later = [b - a for a, b in itertools.pairwise(phases.ends)]
    return {"took": took, "losses": phases.losses, "seconds": later, "gib": peak_gib()}


def in_a_process(compiled: Path, directory: Path, shape: str, steps: int) -> subprocess.Popen[str]:
    """Start a training with empty compilation caches, in a folder of its own in ``compiled``."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment[name] = str(compiled / directory.name / name)
    layers = str(SHAPES[shape]["num_hidden_layers"])
    command = [sys.executable, __file__, "--train", str(directory), "--layers", layers, "--steps", str(steps)]
    command += ["--tiny"] * (shape == TINY) + ["--began", str(time.time())]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a training and return its measurements."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"a training ended with {process.returncode}:\n{output}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def place_for(size: float) -> str:
    """Return a folder with room for ``size`` bytes: in memory, or else on a disk."""
    for place in ("/dev/shm", tempfile.gettempdir()):
        if Path(place).is_dir() and shutil.disk_usage(place).free > size:
            return place
    sys.exit(f"mxfp4.py needs {size / 1e9:.0f} GB in /dev/shm or {tempfile.gettempdir()}; reduce --layers.")


def written(directory: Path, shape: str, *, mxfp4: bool) -> tuple[int, float]:
    """Write a model; return its bytes and the seconds that writing took."""
    began = time.perf_counter()
    sizes = {key: value for key, value in SHAPES[shape].items() if key != "model_type"}
    size = write_gpt_oss(directory, sizes, mxfp4=mxfp4, device=device())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size, time.perf_counter() - began


def measure(folder: Path, compiled: Path, shape: str, steps: int) -> dict[str, dict[str, Any]]:
    """Write the formats and train from them, one after the other, and print the phases of each."""
    began = time.perf_counter()
    found = {}
    for name in FORMATS:
        directory = folder / name
        size, seconds = written(directory, shape, mxfp4=name == "MXFP4")
        process = in_a_process(compiled, directory, shape, steps if name == "MXFP4" else min(steps, STEPS_OF_BF16))
        found[name] = answer(process) | {"bytes": size}
        shutil.rmtree(directory)
        phases = ", ".join(f"{phase} {took:.1f} s" for phase, took in found[name]["took"].items())
        print(
            f"{time.perf_counter() - began:.0f} s: {name}, written in {seconds:.1f} s; {phases}; at most "
            f"{found[name]['gib']:.2f} GiB; steps {found[name]['seconds']}, losses {found[name]['losses']}",
            flush=True,
        )
    return found


def report_on(found: dict[str, dict[str, Any]], shape: str, steps: int, name: str) -> tuple[Report, bool]:
    """Print the tables; return the report and whether all is within its limits."""
    report = Report(
        name,
        "| job | activations | loop | tokens/s | MFU | peak GiB | loss, first to last | largest difference | limits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    ours, other = (found[each] for each in FORMATS)
    run = Run(ours["losses"], [0.0, *ours["seconds"]], ours["gib"])
    speed = run.tokens_per_s(shape)
    held = not torch.cuda.is_available() or run.gib <= JOB.gib
    most = max(abs(a - b) for a, b in zip(run.losses, other["losses"], strict=False))
    layers = SHAPES[shape]["num_hidden_layers"]
    report.row(
        f"| experts-qlora from MXFP4 ({shape}, {layers} layers) | {JOB.memory} | Trainer | {speed:,.0f} "
        f"| {100 * mfu(JOB, shape, speed):.1f} % | {run.gib:.2f} | {run.losses[0]:.4f} to {run.losses[-1]:.4f} "
        f"| {most:.1e} | {JOB.gib:g} GiB: {'held' if held else 'FAILED'} |"
    )
    phases = list(ours["took"])
    report.line(f"| files | GB | {' | '.join(phases)} | of it compiling | start to first step, s |")
    report.row(f"|{' --- |' * (len(phases) + 4)}")
    later, starts = statistics.median(run.seconds[WARM_UP:]), {}
    for each, result in found.items():
        took = result["took"]
        starts[each] = sum(took.values())
        times = " | ".join(f"{seconds:.1f}" for seconds in took.values())
        compiling = took["first step"] - later
        report.row(f"| {each} | {result['bytes'] / 1e9:.1f} | {times} | {compiling:.1f} | {starts[each]:.1f} |")
    ratio = starts["MXFP4"] / starts["bf16"]
    in_time = not torch.cuda.is_available() or ratio <= TIMES_LIMIT
    held &= in_time and most <= LOSS_LIMIT
    report.line(f"From MXFP4 the first step is done after {ratio:.2f} times the time from bf16 (limit {TIMES_LIMIT})")
    report.line(f"{steps} steps; {'all within their limits' if held else 'FAILED'}")
    return report, held


def main() -> int:
    """Measure, print the tables, and return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, help="of gpt-oss-20b, which has 24")
    parser.add_argument("--steps", type=int, default=10, help=f"from MXFP4, {WARM_UP + 1} or more")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this out on a CPU")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/mxfp4.md")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # both for the fresh processes
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = TINY if options.tiny else WHOLE
    if options.layers:
        SHAPES[shape]["num_hidden_layers"] = options.layers
    if options.train:
        print(json.dumps(train(options.train, shape, options.steps, options.began)))
        return 0
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be at least {WARM_UP + 1}; the first {WARM_UP} are warm-up")
    size = 0.0 if options.tiny else BYTES_OF_ENDS + SHAPES[shape]["num_hidden_layers"] * BYTES_OF_A_LAYER
    # Compiled code may not be allowed to run from /dev/shm.
    with tempfile.TemporaryDirectory(dir=place_for(1.1 * size)) as folder, tempfile.TemporaryDirectory() as compiled:
        found = measure(Path(folder), Path(compiled), shape, options.steps)
        print(f"files were in {folder}")
    report, held = report_on(found, shape, options.steps, "mxfp4")
    if options.write:
        report.write()
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
