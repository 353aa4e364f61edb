"""A model directory of 70 billion parameters that takes a few GiB of disk: all layers share the weights of two.

Each layer has its own shard with a true header and a true length, but sparse data. Code that reads only headers (all
checks, the fingerprint) sees a plain directory; code that reads weights gets those of a drawn layer.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPE_70B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
"""The shape of Llama 3.1 70B."""

DRAWN = 2
_FOLDER = "drawn"
_LAYER = re.compile(r"(?<=model\.layers\.)\d+(?=\.)")


def write_shared(directory: Path, shape: dict[str, Any], device: torch.device) -> None:
    """Write a Hugging Face directory of bf16 weights, drawn on ``device``; layer i has those of layer i % DRAWN."""
    config = LlamaConfig(**shape, rope_theta=500_000.0, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    (directory / _FOLDER).mkdir(parents=True)
    config.save_pretrained(directory)
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str) -> Tensor:
        drawn = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
        low_high_or_std = (0.5, 1.5) if "norm" in name else (0.0, config.initializer_range)
        fill = drawn.uniform_ if "norm" in name else drawn.normal_
        return fill(*low_high_or_std, generator=generator).cpu()

    weight_map: dict[str, str] = {}
    for number in range(config.num_hidden_layers):
        names = [name for name in shapes if name.startswith(f"model.layers.{number}.")]
        source = directory / _FOLDER / f"{number % DRAWN}.safetensors"
        if number < DRAWN:
            save_file({name: draw(name) for name in names}, source, {"format": "pt"})
        shard = f"model-layer-{number:03d}.safetensors"
        _write_hole(directory / shard, source, number)
        weight_map |= dict.fromkeys(names, shard)
    rest = [name for name in shapes if name not in weight_map]
    save_file({name: draw(name) for name in rest}, directory / "model-rest.safetensors", {"format": "pt"})
    weight_map |= dict.fromkeys(rest, "model-rest.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_hole(path: Path, source: Path, number: int) -> None:
    """Write the header of a drawn layer with another layer number, and sparse data."""
    with source.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = _LAYER.sub(str(number), file.read(size).decode()).encode()
    header += b" " * (-len(header) % 8)
    data = source.stat().st_size - 8 - size
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + data)


def read_shared(directory: Path) -> None:
    """Make this process load a directory of :func:`write_shared` with its drawn weights from now on."""
    import transformers.modeling_utils

    if (directory / _FOLDER).is_dir():
        transformers.modeling_utils.safe_open = _SharedFile


class _SharedFile:
    """A safetensors file as transformers reads it; the weights of a layer come from the drawn one."""

    def __init__(self, filename: str, **options: Any) -> None:
        self._file = self._source = safe_open(filename, **options)
        self._number = None
        if found := re.search(r"model-layer-(\d+)\.safetensors$", filename):
            self._number = str(int(found[1]) % DRAWN)
            self._source = safe_open(Path(filename).parent / _FOLDER / f"{self._number}.safetensors", **options)

    def get_slice(self, name: str) -> Any:
        return self._source.get_slice(name if self._number is None else _LAYER.sub(self._number, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        for file in {self._file, self._source}:
            file.__exit__(*error)
