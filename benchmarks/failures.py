"""What happens when a rank fails: how long until every process is gone, and what is printed last.

    python benchmarks/failures.py [--write] [--gpu] [--virtual-stages 2]

Jobs of three stages fail in the third step, in every way, under every launcher. With --gpu, they have two stages over
NCCL, on two GPUs if available and on one, which NCCL must support. The seconds count from the failure, or for a hang
from its timeout.

Exits with 1 if a job takes more than 30 s, leaves a process behind, exits with 0, does not get as far as the failure,
or does not name the rank and the reason in its last line (torchrun and deepspeed add lines of their own after it).
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import tests_support  # noqa: F401
from failing_job import failures, run

LIMIT = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/failures.md")
    parser.add_argument("--gpu", action="store_true", help="two ranks over NCCL")
    parser.add_argument("--virtual-stages", type=int, default=1, help="pieces of each stage")
    arguments = parser.parse_args()
    pieces = arguments.virtual_stages
    import torch

    from report import Report

    ranks, launchers = 3, ["lightning", "torchrun", "deepspeed", "nodes"]
    if arguments.gpu:
        ranks, launchers = 2, ["lightning", "nodes"] if torch.cuda.device_count() > 1 else ["nodes"]
    name = "failures_nccl" if arguments.gpu else "failures"
    report = Report(
        name, "| launcher | failure | seconds | exit | left | last line |", "| --- | --- | --- | --- | --- | --- |"
    )
    failed = False
    jobs = [(launcher, failure) for launcher in launchers for failure in failures(ranks, pieces)]
    # Most of a job is its start-up. It takes a core for each process and one for the process that watches them.
    at_once = max(1, (os.cpu_count() or 1) // (ranks + 1))
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = pool.map(lambda each: run(each[1], each[0], ranks, arguments.gpu, pieces), jobs)
        for (launcher, failure), o in zip(jobs, outcomes, strict=True):
            how = f"{failure.how}, rank {failure.rank}"
            report.row(f"| {launcher} | {how} | {o.seconds:.1f} | {o.code} | {o.left} | {o.last_line} |")
            failed |= not o.seconds <= LIMIT or not o.named or o.code == 0 or o.left > 0
    report.line("FAILED" if failed else f"all within {LIMIT:.0f} s, with rank and reason reported and no process left")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
