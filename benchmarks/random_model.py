"""Models of known shapes with random weights, and random sequences for them, for the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    },
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "qwen3-moe-48": {},
    "gpt-oss": {
        "model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_local_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 8, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096,
    },
    "gpt-oss-24": {},
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 4096,
    },
    "tiny-moe": {
        "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192,
        "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128,
    },
    "tiny-gpt-oss": {
        "model_type": "gpt_oss", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    },
}  # fmt: skip
SHAPES["qwen3-moe-48"] = SHAPES["qwen3-moe"] | {"num_hidden_layers": 48}
SHAPES["gpt-oss-24"] = SHAPES["gpt-oss"] | {"num_hidden_layers": 24}
SHAPES["tiny-16"] = SHAPES["tiny"] | {"num_hidden_layers": 16}
"""Llama 3.1 8B and 3.2 1B; Qwen3-30B-A3B and gpt-oss-20b, each with some layers and with all; some layers of Mixtral
8x7B; and four tiny shapes for trying things out."""


def has_experts(shape: str) -> bool:
    return "num_experts_per_tok" in SHAPES[shape]


def facts_of(shape: str) -> dict[str, Any]:
    """Return what a configuration of this shape says, including its ``model_type``."""
    return {"model_type": "llama", "rope_theta": 500_000.0} | SHAPES[shape]


def write_model(directory: Path, shape: str, device: torch.device) -> None:
    """Write a Hugging Face directory with bf16 weights, drawn on ``device`` as transformers initialises them."""
    write_random(directory, facts_of(shape), device)


def write_random(directory: Path, facts: dict[str, Any], device: torch.device) -> None:
    """Write such a directory for any configuration; ``facts`` include its ``model_type``."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**facts)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("dt_bias"):  # slow linear attention's decay, by default a few tokens
            nn.init.uniform_(parameter, -7.0, -1.0)
    model.save_pretrained(directory, max_shard_size="4GB")  # copied to the host one shard at a time


def random_sequences(count: int, length: int, vocabulary: int, documents: int = 1) -> list[dict[str, Tensor]]:
    """Make micro-batches of one sequence each, [1, length], of ``documents`` documents of equal length."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(length // documents).repeat(documents)[None]
    made = []
    for _ in range(count):
        tokens = torch.randint(0, vocabulary, (1, length + 1), generator=generator)
        made.append({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions})
    return made
