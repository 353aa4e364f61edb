"""How long ``pipelite plan`` takes for a 70B-shaped Llama in QLoRA on 4 GPUs of 24 GiB, everything included.

    python benchmarks/plan_speed.py [--runs 5] [--write]

The model is a temporary directory with config.json and the headers of its weight files, which are sparse instead of
holding weights; the configuration is configs/qlora_four_gpus.yaml. Each run is the command as a new process, timed from
start to end, with bytecode compiled as pip leaves it: an extra first run compiles it, even where the environment
forbids Python to write bytecode.

Exits with 1 if the best run takes more than 5 s, or if a run does not print the plan.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tests_support  # noqa: F401
from header_model import LLAMA_70B, write_headers
from report import Report

ROOT = Path(__file__).parent.parent
LIMIT = 5.0  # seconds


def run(model_dir: Path) -> tuple[float, float, float]:
    """Plan once; return the wall time and the CPU time in seconds, and the peak resident memory in GiB."""
    options = ["--config", str(ROOT / "configs" / "qlora_four_gpus.yaml"), "--model_dir", str(model_dir)]
    command = [sys.executable, "-m", "lightning_pipelite", "plan", *options, "--devices", "4", "--memory", "24GiB"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or "70.55 billion parameters" not in printed or "Recommended: " not in printed:
        sys.exit(f"plan_speed.py: the command ended with {process.returncode} and printed {printed!r}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/plan_speed.md")
    arguments = parser.parse_args()
    report = Report("plan_speed", "| runs | best s | median s | processor s | peak RSS GiB |", f"|{' --- |' * 5}")
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_headers(Path(folder) / "llama-70b", LLAMA_70B)
        run(model_dir)  # later runs find compiled files in the page cache
        walls, processor, memory = zip(*(run(model_dir) for _ in range(arguments.runs)), strict=True)
    best = min(walls)
    report.row(
        f"| {len(walls)} | {best:.2f} | {statistics.median(walls):.2f} | {min(processor):.2f} | {max(memory):.2f} |"
    )
    cores = len(os.sched_getaffinity(0))
    report.line(f"On {cores} cores; the best within {LIMIT:g} s: {'yes' if best <= LIMIT else 'NO'}")
    if arguments.write:
        report.write()
    sys.exit(best > LIMIT)


if __name__ == "__main__":
    main()
