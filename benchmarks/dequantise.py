"""Dequantising nf4 weights on a GPU: the kernel against bitsandbytes' operations, in GPU and in host time.

    python benchmarks/dequantise.py [--write]

The floor is the time to read the codes and scales and to write the weight in bf16, at the rate of a large copy on this
GPU. Medians of 20 runs after 5 of warm-up, in turns; host time is that of a call while the GPU is busy.

Exits with 1 if the results of both are not equal bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from bitsandbytes.functional import quantize_4bit

from gpu_time import HEAD_START, milliseconds
from lightning_pipelite.kernels import nf4
from report import Report

SHAPES = {
    "gate and up of 128 experts, Qwen3-30B-A3B": (128, 1536, 2048),
    "up of an 8B Llama": (14336, 4096),
    "query of Qwen3-30B-A3B": (4096, 2048),
    "key of Qwen3-30B-A3B": (512, 2048),
}


def memory_rate() -> float:
    """Return the bytes read and written in a millisecond by a large copy."""
    source, target = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))[0]


def host_time(function: Callable[[], object]) -> float:
    """Return the median host time of a call in microseconds, with the GPU kept busy."""
    taken = []
    for _ in range(25):
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(taken[5:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/dequantise.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("dequantise.py needs a GPU")
    report = Report(
        "dequantise",
        "| weight | scales | floor, us | ours, us | bitsandbytes, us | host: ours, us | bitsandbytes, us | equal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    torch.manual_seed(0)
    rate = memory_rate()
    good = True
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for nested in (False, True):
            codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
            parts = [codes, state.absmax]
            parts += [state.state2.absmax, state.state2.code, state.offset] if nested else []
            ours = partial(nf4.dequantise, parts, shape, torch.bfloat16)
            theirs = partial(nf4.dequantise_by_bitsandbytes, parts, shape, torch.bfloat16)
            equal = torch.equal(ours(), theirs())
            times = milliseconds(ours, theirs)
            floor = (weight.nbytes + sum(part.nbytes for part in parts)) / rate
            hosts = [host_time(ours), host_time(theirs)]
            report.row(
                f"| {name} | {'quantised' if nested else 'float32'} | {floor * 1e3:.1f} | {times[0] * 1e3:.1f} "
                f"| {times[1] * 1e3:.1f} | {hosts[0]:.0f} | {hosts[1]:.0f} | {'yes' if equal else 'NO'} |"
            )
            good = good and equal
    report.line("all equal" if good else "NOT EQUAL")
    if arguments.write:
        report.write()
    sys.exit(not good)


if __name__ == "__main__":
    main()
