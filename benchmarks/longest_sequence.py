"""Memory and speed with long sequences on one GPU: an 8B Llama in 4 bits with a LoRA of rank 32.

    python benchmarks/longest_sequence.py [--lengths 16384,65536,131072] [--shape 8b|tiny] [--write]

Random weights, one micro-batch of one document a step, through the Trainer, with layer inputs offloaded to the host.
Each length trains three steps on the same tokens; the speed is that of the last. Memory is the peak of torch's
allocated memory.

Exits with 1 if a length does not train: it must fit in 80 GB, and its loss must be finite and fall.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lightning_pipelite import PipeLiteModule
from lightning_pipelite.adapters import LoRA
from random_model import SHAPES, random_sequences, write_model
from report import Report
from step_loops import Timing, device, free, one_stage_trainer, peak_gib

RANK, STEPS, LIMIT = 32, 3, 80e9 / 2**30


def train(directory: str, vocabulary: int, length: int) -> tuple[list[float], float]:
    """Return the losses and the seconds of the last step."""
    timing = Timing(STEPS, None)
    module = PipeLiteModule(
        directory, LoRA(RANK), load_in_4bit=True, lr=1e-3, schedule="constant", activation_memory="offload"
    )
    batches = random_sequences(1, length, vocabulary) * STEPS
    one_stage_trainer(timing, STEPS, micro_batches=1).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return timing.losses, timing.ends[-1] - timing.ends[-2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="16384,65536,131072")
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/longest_sequence.md")
    arguments = parser.parse_args()
    report = Report(
        "longest_sequence", "| tokens | peak GiB | tokens/s | loss, first to last |", "| --- | --- | --- | --- |"
    )
    lengths = [int(length) for length in arguments.lengths.split(",")]
    SHAPES[arguments.shape]["max_position_embeddings"] = max(lengths)
    vocabulary, failed = SHAPES[arguments.shape]["vocab_size"], False
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        write_model(Path(directory), arguments.shape, device())
        for length in lengths:
            free()
            try:
                losses, seconds = train(directory, vocabulary, length)
            except torch.cuda.OutOfMemoryError:
                report.row(f"| {length:,} | {peak_gib():.2f} | out of memory | |")
                failed = True
                continue
            gib = peak_gib()
            failed |= gib > LIMIT or not (math.isfinite(losses[-1]) and losses[-1] < losses[0])
            report.row(f"| {length:,} | {gib:.2f} | {length / seconds:,.0f} | {losses[0]:.4f} to {losses[-1]:.4f} |")
    report.line(f"{STEPS} steps; {'FAILED' if failed else 'all trained'}")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
