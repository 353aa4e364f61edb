"""What frozen weights in FP8 and in nf4 cost in quality, compared with bf16.

    python benchmarks/fp8_quality.py [--tiny] [--seeds 3] [--write]

A Llama of 110 million weights is trained from scratch on the standard library's sources and pydoc's topics (1500 steps
of 8192 tokens). Then LoRAs of rank 16 are trained on other text, the sources of torch: 200 steps from bf16, FP8 and nf4
weights over the same tokens, with several seeds, at a learning rate that falls to zero. The table has the evaluation
loss before and after, on sequences that no LoRA was trained on. ``--tiny`` is for CPUs, where FP8 weights are
dequantised before each product: it says nothing about products in FP8.

Exits with 1 if the final loss of FP8, the mean over the seeds, is further from bf16's than nf4's is, or more than 0.3 %
away.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

import tests_support  # noqa: F401
from report import Report
from small_language_model import TINY, Size, base_text, other_text, tokenise, train_base, train_lora

LIMIT = 3e-3
WAYS: dict[str, dict[str, bool]] = {"bf16": {}, "FP8": {"load_in_fp8": True}, "nf4": {"load_in_4bit": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/fp8_quality.md")
    arguments = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    size = TINY if arguments.tiny else Size()
    report = Report("fp8_quality", "| weights | seed | before | after |", "| --- | --- | --- | --- |")
    finals: dict[str, list[float]] = {way: [] for way in WAYS}
    base, other = tokenise(size, base_text(size), other_text(size))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "base"
        learned = train_base(size, base, directory, device)
        for seed in range(arguments.seeds):
            for way, held in WAYS.items():
                first, last = train_lora(size, other, directory, device, seed, **held)
                finals[way].append(last)
                report.row(f"| {way} | {seed} | {first:.4f} | {last:.4f} |")
    means = {way: mean(losses) for way, losses in finals.items()}
    away = {way: abs(means[way] - means["bf16"]) / means["bf16"] for way in ("FP8", "nf4")}
    failed = not (away["FP8"] <= away["nf4"] and away["FP8"] <= LIMIT)
    report.line(
        f"the base's loss {learned:.4f}; after the LoRAs "
        + ", ".join(f"{way} {loss:.4f}" for way, loss in means.items())
        + f"; from bf16's FP8 is {away['FP8']:.3%} away (limit {LIMIT:.1%}), nf4 {away['nf4']:.3%}: "
        + ("FAILED" if failed else "within the limits")
    )
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
