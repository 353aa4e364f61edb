"""Peak memory of each rank in a four-stage load, against its own stage's bytes. Linux only.

    python benchmarks/load_memory.py [--mxfp4] [--write]

Writes a random Llama of more than 500 MB in several shards or, with --mxfp4, a gpt-oss whose experts are in MXFP4 and
are held in bfloat16 (bitsandbytes' CPU quantiser takes 14 bytes for each value of a weight, its GPU quantiser nothing).
Loads each of the four stages in a fresh process, one after the other, and compares the peak of resident memory, above
that after the imports, with

    limit = 1.15 * (bytes of the stage's own weights + bytes of the model's largest tensor),

where the largest tensor of a mixture is one layer's experts in bfloat16.

Two peaks are reported. "peak" is VmHWM, the kernel's own high-water mark, reset after the imports: it counts every
resident page, including the pages of mapped weight files. "anon" is the highest RssAnon, sampled by a thread every
millisecond: the process's own memory without file pages, which the kernel can reclaim at any time. The limit applies to
the stricter one, "peak". Every weight is read once after the load, since weights that need no cast stay views of the
mapped files, whose pages only become resident on first use.

Exits with 1 if a stage is over its limit.
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
LAYERS, MIXTURE_LAYERS = 16, 8
VOCABULARY, WIDTH, EXPERTS = 32000, 1024, 32
LARGEST = {False: 2 * VOCABULARY * WIDTH, True: 2 * EXPERTS * WIDTH * 2 * WIDTH + 2 * EXPERTS * WIDTH * WIDTH}
"""Bytes of the Llama's largest tensor, and of the experts of one gpt-oss layer."""
SLACK = 1.15
MB = 1e6


def write_model(directory: Path) -> None:
    """Write a random bfloat16 Llama of about 540 MB in shards of at most 100 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="100MB")


def write_mixture(directory: Path) -> None:
    """Write a random gpt-oss of about 560 MB whose experts are in MXFP4, one layer a shard."""
    from random_mxfp4 import write_gpt_oss

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": MIXTURE_LAYERS,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": EXPERTS,
    }  # fmt: skip
    write_gpt_oss(directory, sizes, mxfp4=True)


def load_stage(directory: Path, number: int, mixture: bool) -> dict[str, int]:
    """Load one stage in this process; return the bytes of its tensors and the two peaks."""
    from lightning_pipelite.adapters import LoRA
    from lightning_pipelite.models import CausalLMLayers

    anon_before, before = memory("RssAnon"), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current VmRSS (man 5 proc)
    with PeakWatcher(0.001) as watcher:
        adapter = LoRA(8, target_modules=["q_proj", "o_proj"]) if mixture else LoRA(8)
        layers = CausalLMLayers(directory, adapter=adapter, dtype=torch.bfloat16)
        size = (MIXTURE_LAYERS if mixture else LAYERS) // STAGES
        stage = layers.build_stage(number * size, (number + 1) * size, torch.device("cpu"))
        for parameter in stage.parameters():
            parameter.detach().view(torch.uint8).max()
        peak = memory("VmHWM")
    own = sum(tensor.nbytes for tensor in (*stage.parameters(), *stage.buffers()))
    return {"own": own, "peak": peak - before, "anon": watcher.peak - anon_before}


def main() -> int:
    """Run the four loads, print the table, and return 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # both for the fresh processes
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mxfp4", action="store_true", help="a gpt-oss with MXFP4 experts, as shipped")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/load_memory.md, or _mxfp4.md")
    options = parser.parse_args()
    if options.stage is not None:
        print(json.dumps(load_stage(options.directory, options.stage, options.mxfp4)))
        return 0
    failed = False
    report = Report(
        "load_memory_mxfp4" if options.mxfp4 else "load_memory",
        "| stage | own weights, MB | largest tensor | limit | peak | anonymous |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    with tempfile.TemporaryDirectory() as directory:
        (write_mixture if options.mxfp4 else write_model)(Path(directory))
        shards = sorted(Path(directory).glob("*.safetensors"))
        total = sum(path.stat().st_size for path in shards)
        largest = LARGEST[options.mxfp4]
        for number in range(STAGES):
            command = [sys.executable, __file__, "--directory", directory, "--stage", str(number)]
            command += ["--mxfp4"] * options.mxfp4
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
