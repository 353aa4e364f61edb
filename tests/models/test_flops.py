"""FLOP counts equal those of torch's counter for the matrix products of the unsplit model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Qwen3MoeConfig

from lightning_pipelite.models.flops import peak_flops, training_flops
from lightning_pipelite.models.meta_model import MetaModel
from tiny_models import SIZES, write_model

TOKENS = 24


def counted(model: Any) -> int:
    """Return the FLOPs of one document's forward and backward pass."""
    input_ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    return counter.get_total_flops()


def ours(meta_model: MetaModel, model: Any) -> float:
    trained = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    flops = training_flops(meta_model, trained)
    assert flops is not None
    return flops.of(TOKENS, TOKENS**2)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3"])
def test_all_weights(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert ours(MetaModel(tmp_path), model) == counted(model)


def test_layers_that_differ(tmp_path: Path) -> None:
    """Gemma 4's layers without a window have wider heads, which only its per-layer configuration shows."""
    sizes = {
        **SIZES,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    }
    config = Gemma4TextConfig(**sizes, layer_types=["sliding_attention", "full_attention"] * 2)
    assert config.is_heterogeneous
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert ours(MetaModel(tmp_path), model) == counted(model)


@pytest.mark.parametrize("layers", [None, [2, 3]])
def test_a_lora(layers: list[int] | None, tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=layers)
    lora = get_peft_model(model, config)
    # torch does not count the gradient of the lowest trained layer's input, which is not computed.
    first = model.model.layers[layers[0] if layers else 0].self_attn
    projections = [first.q_proj.base_layer, first.k_proj, first.v_proj.base_layer]
    adapters = [first.q_proj.lora_A["default"], first.v_proj.lora_A["default"]]
    spared = 2 * TOKENS * sum(each.weight.numel() for each in [*projections, *adapters])
    # Nor that of this layer's keys: k_proj has no adapter, and its input requires no gradient.
    keys_alone = 2 * TOKENS**2 * SIZES["num_attention_heads"] * SIZES["head_dim"]
    assert ours(MetaModel(tmp_path), lora) == counted(lora) + spared + keys_alone


def test_experts_count_as_often_as_they_are_used(tmp_path: Path) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    config = Qwen3MoeConfig(**SIZES, **experts)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    flops = training_flops(MetaModel(tmp_path), dict(model.named_parameters()))
    assert flops is not None
    hidden, layers = 64, 4
    attention = hidden * 16 * (4 + 2 + 2 + 4)
    used = 2 * 3 * hidden * 96
    assert flops.per_token == 6 * (layers * (attention + hidden * 8 + used) + hidden * 128)
    meta_model: Any = MetaModel(tmp_path)
    meta_model.config = SimpleNamespace(num_attention_heads=4, hidden_size=64)  # without the number of experts used
    assert training_flops(meta_model, {}) is None


def test_peaks() -> None:
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA GeForce RTX 3090": 71e12,
        "NVIDIA GeForce RTX 3090 Ti": 80e12,
        "NVIDIA GeForce GTX 1080": None,
    }.items():
        assert peak_flops(name, torch.bfloat16) == peak
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
