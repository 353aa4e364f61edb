"""A LoRA trained in two stages and loaded by PEFT, and weights in 4 bits, for any tiny model."""

from __future__ import annotations

import copy
import itertools
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from expert_memory import Untrained
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.cli.split_comparison import LIMIT, build, cross_entropy, relative, tokens
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, Stage

CHANGED = 20 * LIMIT  # the minimum change by training or quantising: the control


def lora_through_peft(directory: Path, packed: bool, targets: list[str] | None = None) -> str:
    """Train a LoRA for two steps in two stages, save it, and compare PEFT's logits on the whole model with the stages'.

    Args:
        directory: Directory of the model.
        packed: Option of the layers.
        targets: Names of linear layers; the default ones if not given.

    Returns:
        What is wrong, or "refused" with the reason; an empty string if they are equal.
    """
    adapter = LoRA(4) if targets is None else LoRA(4, target_modules=targets)
    try:
        layers = CausalLMLayers(directory, dtype=torch.float32, adapter=adapter, packed=packed)
        stages = build(layers, min(2, len(layers)))
    except ConfigurationError as refusal:
        return f"refused: {refusal}".replace(str(directory), "the model")
    before = run(stages).detach()
    trained = [p for stage in stages for p in stage.parameters() if p.requires_grad]
    for _ in range(2):  # in the first, A's gradient is zero, as B is
        cross_entropy(run(stages), tokens()[1]).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()
            for parameter in trained:
                if parameter.grad is None:
                    return "LoRA: a parameter has no gradient"
                parameter.sub_(2.0 / norm * parameter.grad)
                parameter.grad = None
    ours = run(stages).detach()
    if not relative(ours, before) > CHANGED:
        return "LoRA: the control failed, training changes nothing"
    with tempfile.TemporaryDirectory() as saved, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter.save(Path(saved), [layers.trained_state(stage) for stage in stages], layers.meta_model)
        whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(whole, saved).train()
        difference = relative(ours, theirs(input_ids=tokens()[0], use_cache=False).logits)
    return "" if difference <= LIMIT else f"LoRA: PEFT's logits differ by {difference:.1e}"


def in_attention(whole: PreTrainedModel) -> list[str]:
    """Return the names of attention's linear layers, except those that state-space models have too."""
    inside = (name for name, module in whole.named_modules() if isinstance(module, nn.Linear))
    names = {name.rpartition(".")[2] for name in inside if re.search(r"attn|attention|mixer", name.rpartition(".")[0])}
    return sorted(names - {"in_proj", "out_proj", "x_proj", "dt_proj"})


def four_bits(directory: Path, plain: PreTrainedModel, packed: bool) -> str:
    """Compare two stages in nf4 with the plain model that has the weights quantised and dequantised by bitsandbytes.

    Returns:
        What is wrong, or "refused" with the reason; an empty string if they are equal.
    """
    try:
        layers = CausalLMLayers(directory, dtype=torch.float32, load_in_4bit=True, adapter=Untrained(), packed=packed)
        stages = build(layers, min(2, len(layers)))
    except ConfigurationError as refusal:
        return f"refused: {refusal}".replace(str(directory), "the model")
    reference = copy.deepcopy(plain)
    weights = dict(reference.named_parameters(remove_duplicate=False))
    quantised: dict[str, Tensor] = {}
    for name, module in itertools.chain.from_iterable(stage.causal_lm.named_modules() for stage in stages):
        if isinstance(module, bnb.nn.Linear4bit):
            quantised[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        for fused in getattr(module, "parametrizations", {}):
            quantised[f"{name}.{fused}"] = getattr(module, fused).detach()
    if not quantised or not compare_logits(plain, stages) > CHANGED:
        return "4 bits: the control failed, they change nothing"
    for name, weight in quantised.items():
        if not torch.equal(weight, nf4_and_back(weights[name])):
            return f"4 bits: {name} is not bitsandbytes'"
    with torch.no_grad():
        for name, weight in quantised.items():
            weights[name].copy_(weight)
    difference = compare_logits(reference, stages)
    return "" if difference <= LIMIT else f"4 bits: logits differ by {difference:.1e}"


def nf4_and_back(weight: Tensor) -> Tensor:
    return dequantize_4bit(*quantize_4bit(weight.detach(), quant_type="nf4"))


@torch.no_grad()
def compare_logits(plain: PreTrainedModel, stages: list[Stage]) -> float:
    """Return by how much the stages' logits differ; infinity if they are not finite."""
    input_ids = tokens()[0]
    passed: Any = (input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids))
    for stage in stages:  # in training mode: in eval mode, bitsandbytes repacks the weights on some CPUs
        passed = stage.train()(passed)
    return relative(passed, plain.train()(input_ids=input_ids, use_cache=False).logits)


def run(stages: list[Stage]) -> Tensor:
    """Return the logits of a chain of stages, with a graph through all of them."""
    input_ids = tokens()[0]
    passed: Any = (input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids))
    for stage in stages:
        passed = stage.train()(passed)
    assert isinstance(passed, Tensor)
    return passed
