"""Llamas of known shapes with random weights, and random sequences for them, for the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

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
}  # fmt: skip
"""Of Llama 3.1 8B, Llama 3.2 1B, and one for trying things out."""


def write_model(directory: Path, shape: str, device: torch.device) -> None:
    """Write a Hugging Face directory with bf16 weights, drawn on ``device`` as transformers initialises them."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], rope_theta=500_000.0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)


def random_sequences(count: int, length: int, vocabulary: int, documents: int = 1) -> list[dict[str, Tensor]]:
    """Make micro-batches of one sequence each, [1, length], of as many documents of equal length."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(length // documents).repeat(documents)[None]
    made = []
    for _ in range(count):
        tokens = torch.randint(0, vocabulary, (1, length + 1), generator=generator)
        made.append({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions})
    return made
