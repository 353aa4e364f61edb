"""Peak memory and time of merging an adapter, and time of analysing adapters of an 8B model.

    python benchmarks/export_memory.py [--write]

Merging: a random bfloat16 Llama of more than 500 MB in four shards and a LoRA on all its linear layers are merged in a
fresh process. The limit of its peak, above the resident memory after the imports, is twice the largest shard. "peak" is
VmHWM, the kernel's high-water mark, reset after the imports; it includes the pages of mapped files.

Analysing: a LoRA of rank 64 on all linear layers and a Control Adapter of rank 64, in the shapes of Llama 8B (32
layers, 4096 wide), are each analysed in a fresh process with two threads, pictures and page included. The limit is ten
seconds.

Exits with 1 if a case is over its limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import tests_support  # noqa: F401
from load_memory import MB
from peak_memory import memory
from report import Report

SECONDS = 10.0
RANK, LAYERS, WIDTH, INNER, KEYS = 64, 32, 4096, 14336, 1024
SHAPES = {"q": (WIDTH, WIDTH), "k": (KEYS, WIDTH), "v": (KEYS, WIDTH), "o": (WIDTH, WIDTH)}
MLP = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}


def write_merge_case(directory: Path) -> None:
    """Write ``base``, in four shards, and ``adapter``."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "base", max_shard_size="150MB")
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(str(directory / "adapter"))


def write_analyze_case(directory: Path, kind: str) -> None:
    """Write a random adapter of Llama 8B's shapes."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    directory.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}"
        if kind == "control":
            directions = torch.linalg.qr(torch.randn(WIDTH, RANK))[0]
            tensors |= {f"{prefix}.control_Q": directions, f"{prefix}.control_S": 0.1 * torch.randn(RANK)}
            continue
        for part, shapes in (("self_attn", SHAPES), ("mlp", MLP)):
            for name, (rows, columns) in shapes.items():
                tensors[f"{prefix}.{part}.{name}_proj.lora_A.weight"] = torch.randn(RANK, columns)
                tensors[f"{prefix}.{part}.{name}_proj.lora_B.weight"] = torch.randn(rows, RANK)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    if kind == "control":
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "CONTROL_ADAPTER", "r": RANK}))
    else:
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear").save_pretrained(str(directory))


def run_case(directory: Path, kind: str) -> dict[str, float]:
    """Merge or analyse in this process; return the seconds and the peak memory in bytes."""
    from lightning_pipelite import export

    torch.set_num_threads(2)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current VmRSS (man 5 proc)
    start = time.perf_counter()
    if kind == "merge":
        export.merge(str(directory / "base"), str(directory / "adapter"), str(directory / "merged"))
    else:
        export.analyze(str(directory / kind), output=str(directory / f"{kind}-analysis"))
    return {"seconds": time.perf_counter() - start, "peak": memory("VmHWM") - before}


def in_fresh_process(directory: Path, kind: str) -> dict[str, float]:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--directory", str(directory), "--case", kind]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(answer.splitlines()[-1])
    return result


def main() -> int:
    """Run the cases, print the table, and return 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # both for the fresh processes
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/export_memory.md")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.directory, options.case)))
        return 0
    report = Report("export_memory", "| case | seconds | peak, MB | limit |", "| --- | --- | --- | --- |")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_merge_case(directory)
        sizes = [path.stat().st_size for path in (directory / "base").glob("*.safetensors")]
        limit = 2 * max(sizes)
        merged = in_fresh_process(directory, "merge")
        failed = merged["peak"] > limit
        case = f"merge, {sum(sizes) / MB:.0f} MB in {len(sizes)} shards, the largest {max(sizes) / MB:.1f} MB"
        report.row(f"| {case} | {merged['seconds']:.1f} | {merged['peak'] / MB:.1f} | {limit / MB:.1f} MB |")
        for kind, told in (("lora", "LoRA on all linear layers"), ("control", "Control Adapter")):
            write_analyze_case(directory / kind, kind)
            found = in_fresh_process(directory, kind)
            failed |= found["seconds"] > SECONDS
            case = f"analyze, {told}, {LAYERS} layers, {WIDTH} wide, rank {RANK}"
            report.row(f"| {case} | {found['seconds']:.1f} | {found['peak'] / MB:.1f} | {SECONDS:g} s |")
    report.line("OVER THE LIMIT" if failed else "All within their limits.")
    if options.write:
        report.write()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
