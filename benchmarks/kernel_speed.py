"""The loss kernels on a GPU: time and memory against the floor set by this GPU's matrix products and copies.

    python benchmarks/kernel_speed.py [--write]

- linear_cross_entropy, forward and backward, 4096 tokens, 4096 wide, frozen head, bf16. The floor is its two matrix
  products alone, over all tokens at once; next to it are the same products over as many tokens at a time as the memory
  limit allows. Memory is what is allocated beyond the inputs and their gradients. For comparison: torch, compiled and
  not, Liger and Apple's CCE (cut-cross-entropy), where they are installed.
- cross_entropy over given logits, in place, forward and backward. The floor is three passes over the logits at copy
  speed: two reads and a write. For comparison: torch's own, compiled and not, and Liger's, all in bf16.

Medians of 20 runs after 5 of warm-up, by CUDA events, in turns, as a GPU's clock falls while it warms up. Every loss,
and the gradient of 256 tokens, is compared with torch's in float32 (the norm of the difference over the norm).

Exits with 1 if linear_cross_entropy takes more than 1.10 times its floor (1.15 with vocabularies of 32 000 and 256 000)
or more than 256 MiB, if cross_entropy takes more than 1.25 times its floor, or if a loss (1e-3) or gradient (1e-2) is
off.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gpu_time import milliseconds
from lightning_pipelite.kernels.cross_entropy import cross_entropy_
from lightning_pipelite.kernels.linear_cross_entropy import linear_cross_entropy
from report import Report

GPU = torch.device("cuda")
TOKENS = WIDTH = 4096
LIMITS = {32_000: 1.15, 128_256: 1.10, 256_000: 1.15}
COMPARED = 128_256  # the vocabulary that the other implementations run with
MEMORY_LIMIT = 256.0  # MiB
CROSS_ENTROPY_LIMIT = 1.25


def two_products(hidden: Tensor, weight: Tensor, rows: int) -> Callable[[], None]:
    """Return a function that computes the products of logits and gradient, ``rows`` tokens at a time."""
    logits, gradient = torch.empty(rows, len(weight), device=GPU, dtype=hidden.dtype), torch.empty_like(hidden)

    def both() -> None:
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            torch.mm(hidden[part], weight.T, out=logits)
            torch.mm(logits, weight, out=gradient[part])

    return both


def head_and_loss(report: Report, vocabulary: int) -> bool:
    """Add a row for linear_cross_entropy, and at 128 256 for all others; return whether ours is within its limits."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, device=GPU, dtype=torch.bfloat16) / WIDTH**0.5
    labels = torch.randint(0, vocabulary, (TOKENS,), device=GPU)
    expected = sum(
        functional.cross_entropy(hidden.detach()[i : i + 512].float() @ weight.float().T, labels[i : i + 512]) * 512
        for i in range(0, TOKENS, 512)
    )
    few = hidden.detach()[:256].float().requires_grad_()
    functional.cross_entropy(few @ weight.float().T, labels[:256], reduction="sum").backward()
    ways: dict[str, Callable[..., Tensor]] = {"linear_cross_entropy": linear_cross_entropy}
    if vocabulary == COMPARED:
        ways |= ways_of_others()
    # A number of rows that divides the tokens, as large as linear_cross_entropy's memory limit allows.
    chunk = next(rows for rows in (4096, 2048, 1024, 512) if rows * vocabulary * 2 <= MEMORY_LIMIT * 2**20)
    products = [two_products(hidden.detach(), weight, rows) for rows in (TOKENS, chunk)]

    def step(way: Callable[..., Tensor]) -> Tensor:
        hidden.grad = None
        loss = way(hidden, weight, labels)
        loss.backward()
        return loss.detach()

    good = False
    for name, way in ways.items():
        try:
            step(way)
        except Exception as error:
            report.row(f"| {vocabulary} | {name} | does not run: {type(error).__name__} | | | | | | |")
            continue
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()  # includes the gradient of the inputs
        torch.cuda.reset_peak_memory_stats()
        loss = step(way)
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        difference = abs(float(loss) / float(expected) - 1)
        assert hidden.grad is not None
        assert few.grad is not None
        of_gradient = float((hidden.grad[:256].float() - few.grad).norm() / few.grad.norm())
        floor, chunked, time = milliseconds(*products, partial(step, way))
        limits = "", ""
        if way is linear_cross_entropy:
            limits = f" (at most {LIMITS[vocabulary]})", f" (at most {MEMORY_LIMIT:.0f})"
            good = time <= LIMITS[vocabulary] * floor and memory <= MEMORY_LIMIT
            good = good and difference < 1e-3 and of_gradient < 1e-2
        report.row(
            f"| {vocabulary} | {name} | {floor:.2f} | {chunk}: {chunked:.2f} | {time:.2f} "
            f"| {time / floor:.3f}{limits[0]} | {memory:,.0f}{limits[1]} | {difference:.0e} | {of_gradient:.0e} |"
        )
    return good


def ways_of_others() -> dict[str, Callable[..., Tensor]]:
    """Return the other implementations of a head with its loss that are installed."""

    def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    ways: dict[str, Callable[..., Tensor]] = {"torch": torchs, "torch.compile": torch.compile(torchs)}
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        ways["Liger"] = partial(liger_fused_linear_cross_entropy, reduction="sum")
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cut

        # By default it skips small gradients, which with random weights are nearly all.
        ways["CCE, all gradients"] = partial(cut, reduction="sum", filter_eps=None)
    return ways


def loss_alone(report: Report, vocabulary: int = COMPARED) -> bool:
    """Add a row for cross_entropy; return whether it is within the limit."""
    torch.manual_seed(0)
    kept = torch.randn(TOKENS, vocabulary, device=GPU, dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (TOKENS,), device=GPU)
    logits = kept.clone()

    def others(function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            logits.copy_(kept)  # Liger's runs in place as well
            leaf = logits.detach().requires_grad_()
            function(leaf, labels, reduction="sum").backward()

        return run

    theirs = {
        "torch": others(functional.cross_entropy),
        "torch.compile": others(torch.compile(functional.cross_entropy)),
    }
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_cross_entropy

        theirs["Liger"] = others(liger_cross_entropy)

    logits.copy_(kept)
    losses = cross_entropy_(logits, labels)
    expected = functional.cross_entropy(kept[:512].float(), labels[:512], reduction="none")
    difference = float((losses[:512] - expected).abs().max())
    copy, time, *times = milliseconds(
        lambda: logits.copy_(kept), lambda: cross_entropy_(logits, labels), *theirs.values()
    )
    floor = 1.5 * copy  # a copy is a read and a write
    report.row(
        f"| {vocabulary} | {floor:.2f} | {time:.2f} | {time / floor:.2f} (at most {CROSS_ENTROPY_LIMIT}) | "
        f"{', '.join(f'{name} {other - copy:.2f}' for name, other in zip(theirs, times, strict=True))} | "
        f"{difference:.0e} |"
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
        "| vocabulary | way | two products, ms | tokens at a time: ms | ms | ratio | MiB | loss, relative difference "
        "| gradient |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    good = [head_and_loss(report, vocabulary) for vocabulary in LIMITS]
    report.row("")
    report.row("| vocabulary | three passes, ms | cross_entropy, ms | ratio | others, ms | loss, difference |")
    report.row("| --- | --- | --- | --- | --- | --- |")
    good.append(loss_alone(report))
    report.line("all within the limits" if all(good) else "LIMITS EXCEEDED")
    if arguments.write:
        report.write()
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
