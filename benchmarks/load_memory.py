"""Peak memory of each rank in a four-stage load, against its own stage's bytes.

Writes a random Llama of more than 500 MB in several shards, loads each of its four stages in a fresh process, one after
the other, and compares the peak of the process's resident memory over what it was after the imports with

    limit = 1.15 * (bytes of the stage's own weights + bytes of the model's largest tensor).

Two peaks are reported. "peak" is VmHWM, the kernel's own high-water mark, reset after the imports: it counts every
resident page, so also the pages of the weight files that are mapped while they are read. "anon" is the highest RssAnon
that a thread saw every millisecond: the memory that the process really holds, without file pages, which the kernel can
take back at any time. The stage is held to the stricter one, "peak". Every weight is read once after the load, since
weights that need no cast stay views of the mapped files, whose pages come in with their first use. Linux only.

    python benchmarks/load_memory.py [--write]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import tests_support  # noqa: F401
from peak_memory import PeakWatcher, memory
from report import Report

STAGES = 4
LAYERS = 16
SLACK = 1.15
MB = 1e6


def write_model(directory: Path) -> None:
    """Write a random bfloat16 Llama of about 540 MB in shards of at most 100 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="100MB")


def load_stage(directory: Path, number: int) -> dict[str, int]:
    """Load one stage in this process and return the bytes it holds and the peaks of memory it took."""
    from lightning_pipelite.adapters import LoRA
    from lightning_pipelite.models import CausalLMLayers

    anon_before, before = memory("RssAnon"), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present VmRSS (man 5 proc)
    with PeakWatcher(0.001) as watcher:
        layers = CausalLMLayers(directory, adapter=LoRA(rank=8))
        size = LAYERS // STAGES
        stage = layers.build_stage(number * size, (number + 1) * size, torch.device("cpu"))
        for parameter in stage.parameters():
            parameter.detach().view(torch.uint8).max()
        peak = memory("VmHWM")
    own = sum(p.nbytes for p in stage.parameters()) + sum(b.nbytes for b in stage.buffers())
    return {"own": own, "peak": peak - before, "anon": watcher.peak - anon_before}


def main() -> int:
    """Run the four loads, print the table, and return 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # these two: one of the fresh processes
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/load_memory.md")
    options = parser.parse_args()
    if options.stage is not None:
        print(json.dumps(load_stage(options.directory, options.stage)))
        return 0
    failed = False
    report = Report(
        "load_memory",
        "| stage | own weights, MB | largest tensor | limit | peak | anonymous |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        shards = sorted(Path(directory).glob("*.safetensors"))
        total = sum(path.stat().st_size for path in shards)
        largest = 32000 * 1024 * 2
        for number in range(STAGES):
            command = [sys.executable, __file__, "--directory", directory, "--stage", str(number)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(answer.splitlines()[-1])
            limit = SLACK * (result["own"] + largest)
            failed |= result["peak"] > limit
            row = [result["own"], largest, limit, result["peak"], result["anon"]]
            report.row(f"| {number} | {' | '.join(f'{value / MB:.1f}' for value in row)} |")
    report.line(
        f"{total / MB:.0f} MB in {len(shards)} shards; {'OVER THE LIMIT' if failed else 'all within the limit'}"
    )
    if options.write:
        report.write()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
