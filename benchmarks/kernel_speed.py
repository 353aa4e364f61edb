"""The kernels on a GPU: time and memory against the floor that this GPU's matrix products and copies set.

    python benchmarks/kernel_speed.py [--write]

- linear_cross_entropy, forward and backward, 4096 tokens, 4096 wide, frozen head, bf16. The floor is its two matrix
  products alone; the memory is what is allocated beside the inputs and their gradients.
- cross_entropy over given logits, in place, forward and backward. The floor is three passes over the logits at copy
  speed: two reads and a write. Beside it torch's own in bf16, and in float32 where it fits.

Medians of 20 runs after 5, by events on the GPU. Every loss is compared with torch's in float32.
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


def milliseconds(function: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[5:])[10]


def two_products(hidden: Tensor, weight: Tensor) -> float:
    """The time of the logits' product and of the gradient's."""
    logits, gradient = hidden @ weight.T, torch.empty_like(hidden)

    def both() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=gradient)

    return milliseconds(both)


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

    floor = two_products(hidden.detach(), weight)
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
    time = milliseconds(ours)
    report.row(
        f"| {vocabulary} | {floor:.2f} | {time:.2f} | {time / floor:.2f} (at most {LIMITS[vocabulary]}) | {memory:.0f} "
        f"(at most {MEMORY_LIMIT:.0f}) | {difference:.0e} |"
    )
    return time <= LIMITS[vocabulary] * floor and memory <= MEMORY_LIMIT and difference < 1e-3


def loss_alone(report: Report, vocabulary: int = 128_256) -> bool:
    """Add a row; return whether it is within the limit."""
    torch.manual_seed(0)
    kept = torch.randn(TOKENS, vocabulary, device=GPU, dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (TOKENS,), device=GPU)
    logits = kept.clone()
    copy = milliseconds(lambda: logits.copy_(kept))
    floor = 1.5 * copy  # a copy is a read and a write

    def torchs() -> None:
        leaf = kept.detach().requires_grad_()
        functional.cross_entropy(leaf, labels, reduction="sum").backward()

    theirs = milliseconds(torchs)
    logits.copy_(kept)
    losses = cross_entropy_(logits, labels)
    expected = functional.cross_entropy(kept[:512].float(), labels[:512], reduction="none")
    difference = float((losses[:512] - expected).abs().max())
    time = milliseconds(lambda: cross_entropy_(logits, labels))
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
        "| vocabulary | two products, ms | linear_cross_entropy, ms | ratio | MiB | loss, relative difference |",
        "| --- | --- | --- | --- | --- | --- |",
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
