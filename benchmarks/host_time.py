"""Host time of a decoder layer, in microseconds a call, forward and backward.

    python benchmarks/host_time.py [--weights bf16 nf4 fp8] [--memory keep] [--tokens 16]

A small Llama with a LoRA on all linear layers has so little work for the GPU that the GPU waits for the host: the time
of a pass is the host's. On a CPU the same runs in plain torch, FP8 included; there, only compare two commits with each
other. The time of a layer is the difference of the medians of many passes through stages of 2 and of 6 layers, divided
by 4, so that what a stage does once is not counted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import tests_support  # noqa: F401
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.quantization import fp8
from random_model import SHAPES, random_sequences, write_random
from report import Report

WEIGHTS: dict[str, dict[str, Any]] = {"bf16": {}, "nf4": {"load_in_4bit": True}, "fp8": {"load_in_fp8": True}}
FEW, MANY = 2, 6
PASSES, UNTIMED = 200, 20


def main() -> int:
    """Time each kind of weights, compiled and not, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--memory", default="keep", choices=["keep", "selective", "recompute", "offload"])
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    report = Report("host_time", "| weights | layers | forward, us | backward, us |", "| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory, mock.patch.object(fp8, "has_fp8", return_value=True):
        facts = {"model_type": "llama", **SHAPES["tiny"], "num_hidden_layers": MANY + 1}
        write_random(Path(directory), facts, device)
        for held in options.weights:
            for compiled in (False, True):
                torch._dynamo.reset()
                layers = CausalLMLayers(
                    directory,
                    adapter=LoRA(rank=16),
                    activation_memory=options.memory,
                    compile_layers=compiled,
                    **WEIGHTS[held],
                )
                few, many = (_passes(layers, count, options.tokens, device) for count in (FEW, MANY))
                each = [1e6 * (m - f) / (MANY - FEW) for f, m in zip(few, many, strict=True)]
                report.row(f"| {held} | {'compiled' if compiled else 'not compiled'} | {each[0]:.0f} | {each[1]:.0f} |")
    return 0


def _passes(layers: CausalLMLayers, count: int, tokens: int, device: torch.device) -> tuple[float, float]:
    """Return the median seconds of a forward and of a backward pass of the first ``count`` layers, without a loss."""
    stage = layers.build_stage(0, count, device)
    stage.expect_documents(1)
    (batch,) = random_sequences(1, tokens, layers.vocabulary[0])
    inputs = tuple(batch[name].to(device) for name in ("input_ids", "position_ids"))
    forward, backward = [], []
    gc.collect()
    gc.disable()
    for _ in range(UNTIMED + PASSES):
        taken, outputs = _timed(lambda: stage(inputs)[0], device)
        forward.append(taken)
        backward.append(_timed(lambda: outputs.backward(torch.ones_like(outputs)), device)[0])  # noqa: B023
    gc.enable()
    return statistics.median(forward[UNTIMED:]), statistics.median(backward[UNTIMED:])


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


if __name__ == "__main__":
    sys.exit(main())
