"""Weights in 4 bits, family by family, against bitsandbytes on the whole weights. Linux only.

    python benchmarks/four_bit.py [--write] [model_type ...]

For each family, a model of four layers with random weights is saved, loaded in two stages with load_in_4bit, in float32
on the CPU, and compared with the same model unsplit:

- each linear layer's dequantised weight equals, bit for bit, that of transformers' own 4-bit model,
- each fused weight of several experts, which transformers leaves in full precision, equals, bit for bit, the plain
  weight put through bitsandbytes' quantize_4bit and back,
- the weights that are not in 4 bits are exactly the embedding, head, norms, routers and vectors, each bit-equal to the
  plain model's,
- the bytes of the experts, with the scales of their blocks, are at most 0.30 of their bytes in bfloat16,
- the logits are finite and within 1e-5 of those of the plain model with the dequantised weights.

Then larger Mixtrals of different depth are loaded, each in a fresh process: the memory taken beyond what stays
allocated, in units of one layer's experts in full precision, must not grow with the depth.

Exits with 1 if one of these fails.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
from transformers.utils import logging

import tests_support  # noqa: F401
from expert_memory import EXPERTS, measure_peak
from four_bit_families import FAMILIES, GROWTH_LIMIT, PEAK_LIMIT, try_family
from report import Report

DEPTHS = (4, 8)


HEAD = (
    "| family | linear layers | fused weights | bytes / bf16 | not in 4 bits | logits | |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


def main() -> int:
    """Try the families, print the table, and return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="all families by default", metavar="model_type")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/four_bit.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    report = Report("four_bit", *HEAD)
    outcomes = []
    for model_type in options.model_types or FAMILIES:
        outcomes.append(try_family(model_type))
        report.row(outcomes[-1].row())
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    experts = sum(outcome.fused > 0 for outcome in outcomes)
    total = len(outcomes)
    report.line(f"{total} families, {experts} with fused experts: {total - wrong} equal, {wrong} wrong.")
    peaks = [measure_peak(depth) for depth in DEPTHS]
    growth = peaks[-1] - peaks[0]
    report.line(
        f"Loading {' and '.join(map(str, DEPTHS))} layers of {EXPERTS} experts takes, beside what stays, "
        f"{' and '.join(f'{peak:.2f}' for peak in peaks)} times one layer's experts in full precision; limits "
        f"{PEAK_LIMIT} and, for the difference, {GROWTH_LIMIT}."
    )
    if options.write:
        report.write()
    return int(wrong > 0 or max(peaks) > PEAK_LIMIT or growth > GROWTH_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
