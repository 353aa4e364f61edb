"""A family's weights in 4 bits, compared with bitsandbytes on the whole weights."""

from __future__ import annotations

import itertools
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from expert_memory import Untrained
from lightning_pipelite.cli.split_comparison import LIMIT, build
from lightning_pipelite.models import CausalLMLayers, Stage
from published_training import compare_logits, nf4_and_back
from tiny_families import tiny, write

RATIO_LIMIT = 0.30
# In one layer's experts: the pieces from the files, their fused weight, and what bitsandbytes' CPU quantiser takes.
PEAK_LIMIT, GROWTH_LIMIT = 2.5, 0.25
# A pattern for the routers' weights of each family; empty for a family without routers.
FAMILIES = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "cohere",
         "cohere2", "glm", "glm4", "olmo", "olmo2", "olmo3", "granite", "starcoder2", "gpt_neox", "stablelm", "smollm3",
         "exaone4", "nemotron", "seed_oss", "opt"),
        "",
    ),
    "mixtral": r"mlp\.gate\.weight",
    "qwen2_moe": r"mlp\.(gate|shared_expert_gate)\.weight",
    "qwen3_moe": r"mlp\.gate\.weight",
    "deepseek_v3": r"mlp\.gate\.weight",
    "gpt_oss": r"mlp\.router\.weight",
    "olmoe": r"mlp\.gate\.weight",
    "glm4_moe": r"mlp\.gate\.weight",
    "phimoe": r"mlp\.router\.weight",
    "granitemoe": r"block_sparse_moe\.router\.weight",
    "ernie4_5_moe": r"mlp\.gate\.weight",
    "dots1": r"mlp\.gate\.weight",
    "llama4_text": r"feed_forward\.router\.weight",
}  # fmt: skip


@dataclass
class Outcome:
    """The result for one family.

    Attributes:
        model_type: The family.
        linear: Number of linear layers in 4 bits.
        fused: Number of fused weights in 4 bits.
        ratio: The fused weights' bytes over their bytes in bfloat16.
        kept: Number of weights not in 4 bits, by kind.
        logits: The largest difference of the logits.
        wrong: A sentence for each thing that is wrong.
    """

    model_type: str
    linear: int = 0
    fused: int = 0
    ratio: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    logits: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def row(self) -> str:
        ratio = f"{self.ratio:.3f}" if self.fused else ""
        kept = ", ".join(f"{count} {kind}" for kind, count in self.kept.items())
        verdict = "; ".join(self.wrong) or "equal"
        cells = (self.model_type, self.linear, self.fused, ratio, kept, f"{self.logits:.0e}", verdict)
        return f"| {' | '.join(map(str, cells))} |"


def kinds(whole: PreTrainedModel, router: str) -> dict[str, str]:
    """Return the kind of each parameter that must not be in 4 bits: embedding, head, norm, router or vector."""
    modules = dict(whole.named_modules())
    found = {}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        module = modules[name.rpartition(".")[0]]
        if isinstance(module, nn.Embedding):
            found[name] = "embedding"
        elif module is whole.get_output_embeddings():
            found[name] = "head"
        elif "Norm" in type(module).__name__:
            found[name] = "norm"
        elif router and re.search(router + "$", name):
            found[name] = "router"
        elif parameter.ndim == 1 or name.rpartition(".")[2].endswith("bias"):
            found[name] = "vector"
    return found


def try_family(model_type: str) -> Outcome:
    """Load one family in two stages and compare."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        plain = write(tiny(model_type), directory)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=quantization)
        layers = CausalLMLayers(directory, dtype=torch.float32, load_in_4bit=True, adapter=Untrained())
        return compare(model_type, plain, theirs, build(layers, 2))


def compare(model_type: str, plain: PreTrainedModel, theirs: PreTrainedModel, stages: list[Stage]) -> Outcome:
    """Compare two 4-bit stages with the plain model and with transformers' 4-bit model. Changes ``plain``."""
    outcome = Outcome(model_type)
    weights = dict(plain.named_parameters(remove_duplicate=False))
    must_stay = kinds(plain, FAMILIES[model_type])
    packed = full = 0
    changed: dict[str, Tensor] = {}
    seen: set[str] = set()
    for module_name, module in itertools.chain.from_iterable(stage.causal_lm.named_modules() for stage in stages):
        if isinstance(module, bnb.nn.Linear4bit):
            name = f"{module_name}.weight"
            reference: Any = theirs.get_submodule(module_name).weight
            expected = dequantize_4bit(reference.data, reference.quant_state)
            changed[name] = dequantize_4bit(module.weight.data, module.weight.quant_state)
            outcome.linear += 1
            if not torch.equal(changed[name], expected):
                outcome.wrong.append(f"{name} is not transformers'")
        for fused, parametrization in getattr(module, "parametrizations", {}).items():
            name = f"{module_name}.{fused}"
            changed[name] = getattr(module, fused).detach().clone()
            outcome.fused += 1
            state = parametrization[0].quant_state
            packed += parametrization.original.nbytes + state.absmax.nbytes + state.code.nbytes
            full += 2 * weights[name].numel()
            if not torch.equal(changed[name], nf4_and_back(weights[name])):
                outcome.wrong.append(f"{name} is not bitsandbytes'")
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own}"
            if name in changed or ".parametrizations." in name:
                continue
            if name not in must_stay:
                outcome.wrong.append(f"{name} is not in 4 bits")
            elif not torch.equal(parameter, weights[name]):
                outcome.wrong.append(f"{name} is not the file's")
            if name not in seen:
                kind = must_stay.get(name, "other")
                outcome.kept[kind] = outcome.kept.get(kind, 0) + 1
            seen.add(name)
    if both := changed.keys() & must_stay.keys():
        outcome.wrong.append(f"{min(both)} is in 4 bits")
    held = {id(weights[name]) for name in changed.keys() | (seen & weights.keys())}  # a tied weight has two names
    if missing := {name for name, weight in weights.items() if id(weight) not in held}:
        outcome.wrong.append(f"no stage holds {min(missing)}")
    if outcome.fused:
        outcome.ratio = packed / full
    if outcome.ratio > RATIO_LIMIT:
        outcome.wrong.append(f"experts take {outcome.ratio:.2f} of their bf16 bytes")
    if compare_logits(plain, stages) < 100 * LIMIT:
        outcome.wrong.append("4 bits were not tested: quantising changes nothing")
    for name, weight in changed.items():
        weights[name].data.copy_(weight)
    outcome.logits = compare_logits(plain, stages)
    if not outcome.logits <= LIMIT:
        outcome.wrong.append("logits")
    outcome.kept = {kind: outcome.kept[kind] for kind in sorted(outcome.kept)}
    return outcome
