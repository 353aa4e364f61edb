"""Bases in files of compressed-tensors: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import merge
from lightning_pipelite.models import CausalLMLayers
from quantised_files import compressed, edit_config, edit_tensors, write_quantised
from tiny_models import build

GROUPS = {"strategy": "group", "group_size": 32}
FILES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "INT4 groups, dense": ("llama", "pack-quantized", 4, GROUPS),
    "INT4 groups, mixture": ("qwen3_moe", "pack-quantized", 4, GROUPS),
    "INT8 packed": ("qwen3", "pack-quantized", 8, {"strategy": "channel"}),
    "INT8": ("llama", "int-quantized", 8, {"strategy": "channel"}),
    "INT8, qwen3": ("qwen3", "int-quantized", 8, {"strategy": "channel"}),
    "FP8 tensors": ("llama", "float-quantized", 8, {"strategy": "tensor"}),
    "FP8 blocks": ("qwen3", "float-quantized", 8, {"strategy": "block", "block_structure": [32, 16]}),
    "FP8 rows, mixture": ("mixtral", "float-quantized", 8, {"strategy": "channel"}),
}
UP = "model.layers.1.mlp.up_proj.weight"


def write(directory: Path, files: str, plain: dict[str, Tensor] | None = None) -> Path:
    kind, form, bits, weights = FILES[files]
    return write_quantised(directory, kind, compressed(form, bits, plain, **weights))


def layers_of(directory: Path) -> CausalLMLayers:
    return CausalLMLayers(directory, dtype=torch.bfloat16, adapter=LoRA(4, target_modules=["o_proj"]))


@pytest.mark.parametrize("files", FILES)
def test_stages_hold_what_the_codes_stand_for(tmp_path: Path, files: str) -> None:
    plain: dict[str, Tensor] = {}
    layers = layers_of(write(tmp_path, files, plain))
    found = {
        name.replace(".base_layer", ""): tensor
        for stage in build(layers, [0, 2, 4])
        for name, tensor in stage.causal_lm.state_dict().items()
    }
    compared = 0
    for name, tensor in plain.items():
        if "experts" not in name:
            assert torch.equal(found[name], tensor), name
            compared += 1
        elif name.endswith(("experts.3.down_proj.weight", "experts.3.w2.weight")):
            fused = found[name.split(".experts.")[0].replace("block_sparse_moe", "mlp") + ".experts.down_proj"]
            assert torch.equal(fused[3], tensor), name
            compared += 1
    assert compared >= 16
    assert str(layers.weights_told).startswith("weights: compressed-tensors")


@pytest.mark.parametrize("end", ["_scale", "_shape", "_packed"])
def test_a_part_that_is_missing_is_refused_by_name(tmp_path: Path, end: str) -> None:
    write(tmp_path, "INT4 groups, dense")
    edit_tensors(tmp_path, lambda tensors: tensors.pop(UP + end, None))
    with pytest.raises(ConfigurationError, match=UP):
        layers_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"symmetric": False}, "symmetric"),
        ({"actorder": "group"}, "actorder"),
        ({"group_size": 48}, "do not divide"),
        ({"num_bits": 3}, "3 bits"),
        ({"rotation": 1}, "rotation"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    write(tmp_path, "INT4 groups, dense")
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    described["config_groups"]["group_0"]["weights"].update(change)
    edit_config(tmp_path, quantization_config=described)
    with pytest.raises(ConfigurationError, match=told):
        layers_of(tmp_path)


def test_experts_that_transformers_cannot_load_are_refused(tmp_path: Path) -> None:
    write_quantised(tmp_path, "mixtral", compressed("int-quantized", strategy="channel"))
    with pytest.raises(ConfigurationError, match="expert"):
        layers_of(tmp_path)


def test_merge_writes_bfloat16(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "INT4 groups, dense")
    layers = layers_of(base)
    layers.adapter.save(
        tmp_path / "adapter", [layers.trained_state(s) for s in build(layers, [0, 2, 4])], layers.meta_model.model_dir
    )
    told = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert told.endswith("these are in bfloat16.")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
