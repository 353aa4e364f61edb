"""The kernels on a GPU: time and memory against the floor that this GPU's matrix products and copies set.

    python benchmarks/kernel_speed.py [--write]

- linear_cross_entropy, forward and backward, 4096 tokens, 4096 wide, frozen head, bf16. The floor is its two matrix
  products alone, of all tokens at once; beside it the same products of as many tokens at a time as the memory allows.
  The memory is what is allocated beside the inputs and their gradients.
- cross_entropy over given logits, in place, forward and backward. The floor is three passes over the logits at copy
  speed: two reads and a write. Beside it torch's own in bf16, and in float32 where it fits.

Medians of 20 runs after 5, by events on the GPU, taken in turns: a GPU's clock falls as it warms up. Every loss is
compared with torch's in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lightning_pipelite.kernels.cross_entropy import cross_entropy_
from lightning_pipelite.kernels.linear_cross_entropy import linear_cross_entropy
from report import Report

GPU = torch.device("cuda")
TOKENS = WIDTH = 4096
LIMITS = {32_000: 1.15, 128_256: 1.10, 256_000: 1.15}
MEMORY_LIMIT = 256.0  # MiB
CROSS_ENTROPY_LIMIT = 1.25
HEAD_START = 2_000_000  # cycles, a millisecond: the host is ahead of the GPU, as in training


def milliseconds(*functions: Callable[[], object]) -> list[float]:
    """The median time of a call of each."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(25):
        for function, taken in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end))
    return [sorted(taken[5:])[10] for taken in times]


def two_products(hidden: Tensor, weight: Tensor, rows: int) -> Callable[[], None]:
    """What takes the logits' product and the gradient's, so many tokens at a time."""
    logits, gradient = torch.empty(rows, len(weight), device=GPU, dtype=hidden.dtype), torch.empty_like(hidden)

    def both() -> None:
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            torch.mm(hidden[part], weight.T, out=logits)
            torch.mm(logits, weight, out=gradient[part])

    return both


def head_and_loss(report: Report, vocabulary: int) -> bool:
    """Add a row; return whether it is within the limits."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, device=GPU, dtype=torch.bfloat16) / WIDTH**0.5
    labels = torch.randint(0, vocabulary, (TOKENS,), device=GPU)

    def ours() -> Tensor:
        hidden.grad = None
        loss = linear_cross_entropy(hidden, weight, labels)
        loss.backward()
        return loss.detach()

    expected = sum(
        functional.cross_entropy(hidden.detach()[i : i + 512].float() @ weight.float().T, labels[i : i + 512]) * 512
        for i in range(0, TOKENS, 512)
    )
    ours()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()  # with the gradient of the inputs
    torch.cuda.reset_peak_memory_stats()
    loss = ours()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    difference = abs(float(loss) / float(expected) - 1)
    # Rows that divide the tokens, of as many as linear_cross_entropy takes.
    chunk = next(rows for rows in (4096, 2048, 1024, 512) if rows * vocabulary * 2 <= MEMORY_LIMIT * 2**20)
    products = [two_products(hidden.detach(), weight, rows) for rows in (TOKENS, chunk)]
    floor, chunked, time = milliseconds(*products, ours)
    report.row(
        f"| {vocabulary} | {floor:.2f} | {chunk}: {chunked:.2f} | {time:.2f} "
        f"| {time / floor:.2f} (at most {LIMITS[vocabulary]}) | {memory:.0f} (at most {MEMORY_LIMIT:.0f}) "
        f"| {difference:.0e} |"
    )
    return time <= LIMITS[vocabulary] * floor and memory <= MEMORY_LIMIT and difference < 1e-3


def loss_alone(report: Report, vocabulary: int = 128_256) -> bool:
    """Add a row; return whether it is within the limit."""
    torch.manual_seed(0)
    kept = torch.randn(TOKENS, vocabulary, device=GPU, dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (TOKENS,), device=GPU)
    logits = kept.clone()

    def torchs() -> None:
        leaf = kept.detach().requires_grad_()
        functional.cross_entropy(leaf, labels, reduction="sum").backward()

    logits.copy_(kept)
    losses = cross_entropy_(logits, labels)
    expected = functional.cross_entropy(kept[:512].float(), labels[:512], reduction="none")
    difference = float((losses[:512] - expected).abs().max())
    copy, time, theirs = milliseconds(lambda: logits.copy_(kept), lambda: cross_entropy_(logits, labels), torchs)
    floor = 1.5 * copy  # a copy is a read and a write
    report.row(
        f"| {vocabulary} | {floor:.2f} | {time:.2f} | {time / floor:.2f} (at most {CROSS_ENTROPY_LIMIT}) | "
        f"{theirs:.2f} | {difference:.0e} |"
    )
    return time <= CROSS_ENTROPY_LIMIT * floor and difference < 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kernel_speed.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernel_speed.py needs a GPU")
    report = Report(
        "kernel_speed",
        "| vocabulary | two products, ms | tokens at a time: ms | linear_cross_entropy, ms | ratio | MiB "
        "| loss, relative difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    )
    good = [head_and_loss(report, vocabulary) for vocabulary in LIMITS]
    report.row("")
    report.row("| vocabulary | three passes, ms | cross_entropy, ms | ratio | torch, bf16, ms | loss, difference |")
    report.row("| --- | --- | --- | --- | --- | --- |")
    good.append(loss_alone(report))
    report.line("all within the limits" if all(good) else "PASSED THE LIMITS")
    if arguments.write:
        report.write()
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
