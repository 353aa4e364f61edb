"""Maps Hugging Face models to llama.cpp's architectures, with what its conversion does to the weights."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
from transformers import PretrainedConfig

from lightning_pipelite.errors import ConfigurationError

# The gguf library knows tensor names but not model types. Each entry was taken from llama.cpp's conversion code: the
# architecture, and whether the rows of q and k are permuted. Types whose conversion does more to linear layers (splits
# fused q, k and v or latent projections, reorders interleaved experts) are not listed, and so are refused.
PLAIN = {
    "apertus": "apertus",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "nemotron": "nemotron",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmoe": "olmoe",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "seed_oss": "seed_oss",
    "starcoder2": "starcoder2",
}
PERMUTED = {
    "arcee": "arcee",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "smollm3": "smollm3",
}
NUMBERS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class Architecture:
    """A llama.cpp architecture, for a model of a given depth.

    Attributes:
        name: Its name in GGUF.
        names: The gguf library's map from Hugging Face's tensor names to GGUF's.
        heads: For "q_proj" and "k_proj", the number of heads whose rows are permuted; empty if none are.
    """

    name: str
    names: gguf.TensorNameMap
    heads: dict[str, int]


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the architecture of a model.

    Raises:
        ConfigurationError: The model type is unknown to llama.cpp, or its conversion does more than is supported here.
    """
    kind = config.model_type
    name = PLAIN.get(kind) or PERMUTED.get(kind)
    if name is None:
        known = ", ".join(sorted([*PLAIN, *PERMUTED]))
        raise ConfigurationError(
            f"an adapter of a model of type {kind} cannot be exported to llama.cpp; supported types are {known}."
        )
    heads = {}
    if kind in PERMUTED:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return Architecture(name, gguf.get_tensor_name_map(NUMBERS[name], config.num_hidden_layers), heads)
