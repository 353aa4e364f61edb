"""Training of many model families in two stages against a plain loop over the unsplit model.

    python benchmarks/families.py [--steps 10] [--write] [model_type ...]

Each family is a model of four layers with random weights (norms, biases and scales moved away from their initial
values), trained in full and with LoRA by two processes over gloo. The table has the largest difference in the loss of
any step and in the final weights (relative, in the 2-norm, the worst tensor) from a loop in plain torch that runs each
packed document alone. Float32 on CPUs, with clipped gradients and unequally masked tokens. Where a difference exceeds
its limit and rounding alone decided a router's choice in the plain loop, other data are drawn, four times at most.

Exits with 1 if a difference exceeds its limit: 1e-5 (losses), 1e-4 (weights).
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers.utils import logging

import tests_support  # noqa: F401
from exact_training import LOSS_LIMIT, WEIGHT_LIMIT
from family_training import modes, try_family
from processes import Workers
from report import Report

# What each family covers.
FAMILIES = {
    "llama": "",
    "mistral": "sliding window",
    "qwen2": "biases, tied",
    "qwen3": "norms of queries and keys",
    "phi3": "fused projections, sliding window",
    "gemma2": "soft-capped attention and logits, scaled and tied embedding, sliding window",
    "gemma3_text": "two rotary bases, scaled and tied embedding, sliding window",
    "cohere": "parallel blocks, layer norms without bias, tied, scaled logits",
    "cohere2": "parallel blocks, layers without rotation, tied",
    "glm4": "norms after attention and MLP, half rotated",
    "olmo3": "norms after attention and MLP only, sliding window",
    "granite": "scaled embedding, residuals, attention and logits",
    "starcoder2": "layer norms and biases, tied, sliding window",
    "gpt_neox": "parallel blocks, fused projections, biases",
    "falcon": "parallel blocks, one key and value, tied",
    "opt": "learned positions, layer norms and biases, tied",
    "mixtral": "experts",
    "qwen3_moe": "experts",
    "deepseek_v3": "latent attention, experts in groups, shared experts, a dense layer first",
    "gpt_oss": "experts with biases, attention sinks, sliding window",
}


def main() -> int:
    """Train the families, print the table, and return 1 if one exceeds the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="all families by default", metavar="model_type")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/families.md")
    options = parser.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    workers = Workers(2)
    head = ("| family | build | training | loss | weights |", "| --- | --- | --- | --- | --- |")
    report = Report("families", *head)
    wrong = 0
    for model_type in options.model_types or FAMILIES:
        for case in modes(model_type):
            loss, weight = try_family(workers, model_type, case, options.steps)
            wrong += not (loss <= LOSS_LIMIT and weight <= WEIGHT_LIMIT)
            report.row(f"| {model_type} | {FAMILIES[model_type]} | {case.name} | {loss:.1e} | {weight:.1e} |")
    workers.close()
    report.line(
        f"{len(options.model_types or FAMILIES)} families, {options.steps} steps in two stages; limits "
        f"{LOSS_LIMIT:.0e} (losses), {WEIGHT_LIMIT:.0e} (weights): "
        f"{f'{wrong} EXCEEDED THE LIMITS' if wrong else 'all within'}"
    )
    if options.write:
        report.write()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
