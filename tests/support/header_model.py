"""Models that consist only of config.json and the headers of the weight files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28_672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256,
    "max_position_embeddings": 131_072, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip


def write_headers(directory: Path, config: dict[str, Any], shards: int = 30) -> Path:
    """Write config.json and sparse weight files, with headers but without weights."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for number in range(layers):
        prefix = f"model.layers.{number}."
        for name, shape in (
            ("self_attn.q_proj", [hidden, hidden]), ("self_attn.k_proj", [keys, hidden]),
            ("self_attn.v_proj", [keys, hidden]), ("self_attn.o_proj", [hidden, hidden]),
            ("mlp.gate_proj", [inner, hidden]), ("mlp.up_proj", [inner, hidden]), ("mlp.down_proj", [hidden, inner]),
            ("input_layernorm", [hidden]), ("post_attention_layernorm", [hidden]),
        ):  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = shape
    shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    directory.mkdir(parents=True)
    names = list(shapes)
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(0, len(names), size):
        file = f"model-{number:05d}.safetensors"
        header: dict[str, Any] = {}
        offset = 0
        for name in names[number : number + size]:
            count = shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + 2 * count]}
            offset += 2 * count
            weight_map[name] = file
        encoded = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(encoded)) + encoded)
            out.truncate(8 + len(encoded) + offset)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory
