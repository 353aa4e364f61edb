"""Products with frozen weights in FP8 on a GPU: the time of each part, compared with bf16.

    python benchmarks/fp8_speed.py [--write]

For the weights of a Llama 8B and 4096 tokens, in milliseconds: the product in bf16; forward in FP8 (row-wise
torch._scaled_mm); the cast of its input alone (in a layer, that of narrow rows is fused into what computes them);
backward in FP8 from a single copy of the codes, which are transposed for each product; backward with a second,
transposed copy (fp8_transpose_cache); and the transposition alone, by this project's kernel, with its share of the copy
speed, and by torch's copy. Then the adapter's product, of rank 16 a projection, that is added to an output or to x's
gradient: by torch.addmm in place, and by this project's kernel, which writes each sum into memory of its own, with its
share of the copy speed; for two projections at once, such as gate and up, torch copies the parts. Medians of 20 runs
after 5 of warm-up.

Exits with 1 if the error of a row of a result, against float64 on the values that the codes stand for, exceeds bf16's
rounding (6e-3), including rows as large as bf16 allows, or if the transposition changes a value.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from torch import Tensor

from gpu_time import milliseconds
from lightning_pipelite.kernels import fp8
from lightning_pipelite.kernels.fp8_rows import cast_rows, dequantise_rows, quantise_rows
from lightning_pipelite.kernels.low_rank_sum import low_rank_sums
from report import Report

GPU = torch.device("cuda")
TOKENS = 4096
SUMS = ((1, 4096), (1, 14336), (2, 14336))
RANK = 16
WEIGHTS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
ROUNDING = 6e-3


def row_error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def right(rows: list[Tensor], weight: list[Tensor], back: bool) -> float:
    """Return the largest relative error of a row of the product, over the first 128 tokens."""
    few = [each[:128] for each in rows]
    found = fp8.product(few, weight, torch.bfloat16, back=back)
    of_rows = dequantise_rows(few[0], few[1], torch.float64)
    whole = weight[0].double() if back else dequantise_rows(weight[0], weight[1], torch.float64).T
    return row_error(found, of_rows @ whole)


def by_torch(base: Tensor, left: Tensor, diagonal: Tensor, parts: int) -> None:
    base.addmm_(left, diagonal.T, alpha=1e-6)
    if parts > 1:
        for part in base.chunk(parts, dim=1):
            part.clone(memory_format=torch.contiguous_format)


def sums(report: Report, copy: float) -> bool:
    """Report the times of low-rank sums; ``copy`` is the milliseconds that copying 2**28 bytes takes."""
    report.line("| projections | width | torch.addmm | this project | of the copy speed | largest error |")
    report.row("| --- | --- | --- | --- | --- | --- |")
    failed = False
    for count, width in SUMS:
        torch.manual_seed(0)
        base, left, *rights = (
            torch.randn(*shape, device=GPU, dtype=torch.bfloat16)
            for shape in ((TOKENS, count * width), (TOKENS, count * RANK), *[(width, RANK)] * count)
        )
        diagonal = torch.block_diag(*rights)
        wanted = base.double() + left.double() @ diagonal.double().T
        error = row_error(torch.cat(low_rank_sums(base, left, rights, 1.0), dim=1), wanted)
        failed |= not error <= ROUNDING
        times = milliseconds(
            partial(by_torch, base, left, diagonal, count), partial(low_rank_sums, base, left, rights, 1e-6)
        )
        share = 2 * base.numel() / 2**28 * copy / times[1]
        report.row(f"| {count} | {width} | {times[0]:.3f} | {times[1]:.3f} | {share:.0%} | {error:.1e} |")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/fp8_speed.md")
    arguments = parser.parse_args()
    report = Report(
        "fp8_speed",
        "| weight | bf16 | forward | cast | backward | two copies | transposing | torch's copy | largest error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    failed = False
    cast = torch.compile(cast_rows)
    source = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    (copy,) = milliseconds(partial(torch.empty_like(source).copy_, source))
    del source
    for outputs, inputs in WEIGHTS:
        torch.manual_seed(0)
        weight = torch.randn(outputs, inputs, device=GPU, dtype=torch.bfloat16) / inputs**0.5
        x = torch.randn(TOKENS, inputs, device=GPU, dtype=torch.bfloat16)
        g = torch.randn(TOKENS, outputs, device=GPU, dtype=torch.bfloat16)
        for each in (x, g):
            each *= 10 ** torch.linspace(-3, 3, TOKENS, device=GPU)[torch.randperm(TOKENS, device=GPU), None]
            each[5] *= 1e36 / float(each[5].abs().max())
        parts = quantise_rows(weight)
        rows, back_rows = quantise_rows(x), quantise_rows(g, parts[1])
        turned = fp8.transposed(parts[0])
        failed |= not torch.equal(turned.view(torch.uint8), parts[0].view(torch.uint8).T)
        cached = [*parts, turned]
        error = max(right(rows, parts, False), right(back_rows, parts, True), right(back_rows, cached, True))
        failed |= not error <= ROUNDING
        codes = parts[0].view(torch.uint8)
        times = milliseconds(
            partial(torch.mm, x, weight.T),
            partial(fp8.product, rows, parts, torch.bfloat16, back=False),
            partial(cast, x),
            partial(fp8.product, back_rows, parts, torch.bfloat16, back=True),
            partial(fp8.product, back_rows, cached, torch.bfloat16, back=True),
            partial(fp8.transposed, parts[0]),
            partial(torch.clone, codes.T, memory_format=torch.contiguous_format),
        )
        share = codes.numel() / 2**28 * copy / times[5]
        report.row(
            f"| {outputs} x {inputs} | "
            + " | ".join(f"{time:.3f}" for time in times[:5])
            + f" | {times[5]:.3f} ({share:.0%}) | {times[6]:.3f} | {error:.1e} |"
        )
    failed |= sums(report, copy)
    report.line("FAILED" if failed else "all correct")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
