"""A training step with Control Adapters against the same step without them.

    python benchmarks/control.py [--gpu] [--write]

With --gpu: the geometry of Llama 8B (32 layers, 4096 wide, vocabulary 32 000), random bf16 weights, one stage, 4
micro-batches of 4096 tokens in two documents, with tokens of all classes, and Control Adapters of rank 16 in float32 on
every layer. A step is forward, backward, the optimizer, and the update that keeps Q orthogonal. Without adapters
nothing is trained, but gradients still flow down to the embedding, as they do with them. Steps of both kinds alternate;
times are medians. Without --gpu, a small model on the CPU.

With --gpu, exits with 1 if the ratio exceeds 1.05 with activations kept. With recomputation it is only reported:
without adapters, the compiler drops each layer's last product from the recomputation, but an adapter's gradient needs
it. On the CPU, all ratios are only reported.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optimi import Adam
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_pipelite.adapters import ControlAdapter
from lightning_pipelite.models import Stage
from lightning_pipelite.models.attention import varlen as attention
from lightning_pipelite.models.memory import compile_layers, set_activation_memory
from lightning_pipelite.models.meta_model import MetaModel
from report import Report

LIMIT, MICRO_BATCHES = 1.05, 4


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    inner: int
    heads: int
    tokens: int
    repeats: int
    dtype: torch.dtype


GPU = Size(32, 4096, 14336, 32, 4096, 8, torch.bfloat16)
CPU = Size(2, 256, 896, 4, 256, 3, torch.float32)


def make_stage(
    meta_model: MetaModel, adapter: ControlAdapter | None, memory: str, size: Size, device: torch.device
) -> Stage:
    """Build a random model as one stage whose gradients flow down to the embedding."""
    torch.manual_seed(0)
    kernel = attention.NAME if attention.has_kernel(device, size.dtype) else None  # as CausalLMLayers chooses it
    with device:
        model: Any = AutoModelForCausalLM.from_config(meta_model.config, dtype=size.dtype, attn_implementation=kernel)
    model.requires_grad_(False)
    layers = list(model.get_submodule(meta_model.layers_name))
    set_activation_memory(layers, memory, device, compiled=device.type == "cuda")  # as CausalLMLayers does
    if device.type == "cuda":
        compile_layers(layers)
    if adapter is not None:
        adapter.apply(model, meta_model, seed=0)
        for name, parameter in model.named_parameters():
            if name.endswith("control_S"):
                nn.init.normal_(parameter, std=0.1)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    return Stage(model, meta_model.layers_name, 0, size.layers, start_inputs=meta_model.start_inputs).train()


def training_step(stage: Stage, adapter: ControlAdapter | None, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """Return a step: forward, backward and, if anything is trained, the optimizer."""
    trained = [p for p in stage.parameters() if p.requires_grad]
    optimizer: Any = Adam(trained, lr=1e-5, foreach=inputs[0].is_cuda or None) if trained else None
    labels = inputs[0].flatten().roll(-1)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            logits = stage(inputs if trained else inputs[:2])
            assert isinstance(logits, Tensor)
            nn.functional.cross_entropy(logits[0].float(), labels).backward()
        if adapter is not None:
            optimizer.step()
            optimizer.zero_grad()
            adapter.after_step(stage.causal_lm)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="Llama 8B's geometry on the first GPU, with the limit")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/control.md")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        sys.exit("control.py --gpu needs a GPU")
    size, device = (GPU, torch.device("cuda:0")) if arguments.gpu else (CPU, torch.device("cpu"))
    config = LlamaConfig(
        vocab_size=32_000 if arguments.gpu else 512, hidden_size=size.hidden, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=max(1, size.heads // 4),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        meta_model = MetaModel(Path(directory))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, size.tokens), generator=generator)
    half = size.tokens // 2
    positions = torch.cat([torch.arange(half), torch.arange(size.tokens - half)])[None]
    classes = torch.randint(-1, 2, (1, size.tokens), generator=generator)
    inputs = tuple(tensor.to(device) for tensor in (tokens, positions, classes))
    adapter = ControlAdapter(16)
    kinds: dict[str, ControlAdapter | None] = {"without": None, "with Control Adapters": adapter}
    report = Report(
        "control_gpu" if arguments.gpu else "control",
        "| activations | a step without, ms | with Control Adapters, ms | ratio |",
        "| --- | --- | --- | --- |",
    )
    ratios = {}
    for memory in ("keep", "recompute"):
        steps = {
            name: training_step(make_stage(meta_model, kind, memory, size, device), kind, inputs)
            for name, kind in kinds.items()
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(size.repeats + 2):  # two to warm up
            for name, step in steps.items():
                if arguments.gpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                if arguments.gpu:
                    torch.cuda.synchronize()
                if repeat >= 2:
                    times[name].append(1e3 * (time.perf_counter() - start))
        without, with_them = (statistics.median(taken) for taken in times.values())
        ratios[memory] = with_them / without
        report.row(f"| {memory} | {without:.1f} | {with_them:.1f} | {ratios[memory]:.3f} |")
        del steps, step
        gc.collect()
    failed = arguments.gpu and ratios["keep"] > LIMIT
    verdict = f"; limit {LIMIT} where activations are kept: {'FAILED' if failed else 'within'}" if arguments.gpu else ""
    report.line(f"{size.layers} layers, {size.tokens} tokens, {MICRO_BATCHES} micro-batches a step{verdict}")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
