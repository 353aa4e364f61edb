"""Writes a gpt-oss of any size with random weights, its experts in MXFP4 or in bfloat16 with the same values."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
EXPONENTS = range(119, 121)  # with uniform codes, this gives weights with a standard deviation of 0.018
SCALE = 0.02  # standard deviation of the other weights

Parts = Sequence[Tensor]
"""The parts of a tensor in a file, concatenated along its first dimension."""


def write_gpt_oss(directory: Path, sizes: Mapping[str, Any], *, mxfp4: bool, device: str | torch.device = "cpu") -> int:
    """Write a Hugging Face directory, one file a layer, and return the bytes of its weights.

    Drawing billions of values takes minutes on a CPU, so the experts are drawn once: each layer has those of the layer
    before, rotated by one, which also takes no copy.

    Args:
        directory: Where to write it; created if missing.
        sizes: Options of ``GptOssConfig``.
        mxfp4: Whether the experts are in MXFP4, or in bfloat16 with the values of those codes.
        device: The device that draws the values, which depend on it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = GptOssConfig(**{"pad_token_id": 0, **sizes}, dtype=torch.bfloat16)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    if mxfp4:
        config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": PLAIN}
    config.save_pretrained(directory)
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in shapes.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "ends"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = tensor
    drawn: dict[str, dict[str, Tensor]] = {}  # experts, by the name of the weight without its layer number
    weight_map, sizes_on_disk = {}, []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, tensors in files.items():
            content: dict[str, Parts] = {}
            for name, tensor in tensors.items():
                prefix, _, kind = name.rpartition(".")
                if kind in ("gate_up_proj", "down_proj"):
                    if kind not in drawn:
                        drawn[kind] = _experts(kind, tensor.shape, mxfp4, device)
                    first = int(name.split(".")[2]) % tensor.shape[0]
                    for part, values in drawn[kind].items():
                        content[f"{prefix}.{part}"] = values[first:], values[:first]
                else:
                    content[name] = [_plain(name, tensor.shape, device)]
            weight_map.update(dict.fromkeys(content, file))
            sizes_on_disk.append(pool.submit(_write, directory / file, content))
        total = sum(each.result() for each in sizes_on_disk)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _experts(kind: str, shape: torch.Size, mxfp4: bool, device: str | torch.device) -> dict[str, Tensor]:
    """Return the tensors of a layer's experts, shape [experts, in, out], by their names in the file."""
    experts, inputs, outputs = shape
    generator, blocks = _generator(kind, device), (experts, outputs, inputs // 32, 16)
    codes = torch.randint(0, 256, blocks, dtype=torch.uint8, device=device, generator=generator)
    exponents = (EXPONENTS.start, EXPONENTS.stop)
    scales = torch.randint(*exponents, blocks[:-1], dtype=torch.uint8, device=device, generator=generator)
    if mxfp4:
        return {f"{kind}_blocks": codes.cpu(), f"{kind}_scales": scales.cpu()}
    return {kind: convert_moe_packed_tensors(codes, scales, dtype=torch.bfloat16).contiguous().cpu()}


def _plain(name: str, shape: torch.Size, device: str | torch.device) -> Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if "norm" in name:
        values.uniform_(0.5, 1.5, generator=_generator(name, device))
    else:
        values.normal_(0.0, SCALE, generator=_generator(name, device))
    return values.cpu()


def _generator(name: str, device: str | torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def _write(path: Path, content: Mapping[str, Parts]) -> int:
    """Write a safetensors file part by part, and return the bytes of its tensors.

    safetensors' own function needs each tensor in one piece, copies it, and blocks other threads meanwhile.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, parts in content.items():
        count = sum(part.nbytes for part in parts)
        dtype = {torch.uint8: "U8", torch.bfloat16: "BF16"}[parts[0].dtype]
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        assert count == math.prod(shape) * parts[0].element_size()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + count]}
        place += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in (part for parts in content.values() for part in parts if part.nbytes):
            view = memoryview(part.contiguous().flatten().view(torch.uint8).numpy())
            while view:
                view = view[file.write(view) :]  # a write takes at most 2 GiB
    return place
