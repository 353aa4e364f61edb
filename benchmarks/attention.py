"""Attention over packed documents on a GPU: varlen FlashAttention against a document mask and against one document.

    python benchmarks/attention.py [--write]

Exactness: models with random weights run forward and backward in bf16, with varlen and with eager attention. The table
has the distance (relative, in the 2-norm) of the logits and of all gradients to eager attention in float32.

Speed: attention alone, forward and backward, in the shape of Llama 8B, over packed documents with varlen and with a
mask, and over a single causal document of as many tokens. For the latter, torch picks cuDNN's kernel on a Hopper GPU,
which is twice as fast there.

Exits with 1 if varlen's distance is more than 1.5 times eager's, or if varlen is slower than the mask.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from gpu_time import milliseconds
from lightning_pipelite.adapters import Full
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.attention.document_mask import document_mask
from lightning_pipelite.models.attention.varlen import varlen_attention
from report import Report

GPU = torch.device("cuda")
DOCUMENTS = (517, 3, 1100, 64, 364)
SIZES = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "Llama": LlamaConfig(**SIZES),
    "Qwen3": Qwen3Config(**SIZES),
    "Gemma 3, window 256": Gemma3TextConfig(
        **SIZES, sliding_window=256, layer_types=["sliding_attention", "full_attention"] * 2
    ),
}


def run(directory: str, dtype: torch.dtype, attention: str) -> tuple[Tensor, Tensor]:
    """Return the logits and all gradients, in float32."""
    layers = CausalLMLayers(directory, dtype=dtype, adapter=Full(), attn_implementation=attention)  # type: ignore[arg-type]
    stage = layers.build_stage(0, len(layers), GPU)
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 4096, (2, 1, sum(DOCUMENTS)), generator=generator).to(GPU).unbind()
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None].to(GPU)
    logits = stage((ids, positions))
    nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
    return logits.detach().float(), torch.cat([p.grad.float().flatten() for p in stage.parameters()])  # type: ignore[union-attr]


def compare_times(tokens: int, length: int) -> list[float]:
    """Time documents of ``length`` tokens by varlen and by a mask, and one causal attention over ``tokens``."""
    inputs = [
        torch.randn(1, heads, tokens, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True) for heads in (32, 8, 8)
    ]
    query, key, value = inputs
    positions = (torch.arange(tokens, device=GPU) % length)[None]
    document = torch.arange(tokens, device=GPU) // length
    place = torch.arange(tokens, device=GPU)
    mask = ((document[:, None] == document) & (place[:, None] >= place))[None, None]

    def varlen() -> Tensor:
        with document_mask(positions, most=-(-tokens // length)):  # counted before, as in training: no host sync
            return varlen_attention(nn.Module(), query, key, value, None)[0]

    def with_mask() -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    def one_document() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    ways = varlen, with_mask, one_document
    gradients = [torch.randn_like(way()) for way in ways]

    def forward_and_backward(way: Callable[[], Tensor], gradient: Tensor) -> None:
        torch.autograd.grad(way(), inputs, gradient)

    return milliseconds(*(partial(forward_and_backward, *each) for each in zip(ways, gradients, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/attention.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("attention.py needs a GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = False
    report = Report("attention", "| model | of | varlen, bf16 | eager, bf16 |", "| --- | --- | --- | --- |")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as directory:
            AutoModelForCausalLM.from_config(config).save_pretrained(Path(directory))
            exact = run(directory, torch.float32, "eager")
            varlen, eager = (run(directory, torch.bfloat16, attention) for attention in ("varlen", "eager"))
        for what, reference, *found in zip(("logits", "gradients"), exact, varlen, eager, strict=True):
            ours, theirs = (float((each - reference).norm() / reference.norm()) for each in found)
            report.row(f"| {name} | {what} | {ours:.2e} | {theirs:.2e} |")
            failed |= not ours <= 1.5 * theirs
    report.row("")
    report.row("| tokens | documents of | varlen ms | mask ms | one causal document ms |")
    report.row("| --- | --- | --- | --- | --- |")
    for tokens, length in ((4096, 512), (4096, 2048), (16384, 1024), (16384, 16384)):
        ours_ms, mask_ms, causal_ms = compare_times(tokens, length)
        report.row(f"| {tokens} | {length} | {ours_ms:.2f} | {mask_ms:.2f} | {causal_ms:.2f} |")
        failed |= not ours_ms <= mask_ms
    report.line("FAILED" if failed else "varlen is as exact as eager, and faster than a mask")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
