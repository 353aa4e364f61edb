"""Bases quantised by compressed-tensors: which files are read, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from exact_comparison import compare_with_plain
from exact_training import LOSS_LIMIT, WEIGHT_LIMIT, Case, Scale, Split
from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import merge
from lightning_pipelite.models import CausalLMLayers
from processes import Workers
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
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
            compared += 1
        elif name.endswith(("experts.3.down_proj.weight", "experts.3.w2.weight")):
            fused = found[name.split(".experts.")[0].replace("block_sparse_moe", "mlp") + ".experts.down_proj"]
            torch.testing.assert_close(fused[3], tensor, rtol=0, atol=0, msg=name)
            compared += 1
    assert compared >= 16
    assert str(layers.weights_told).startswith("weights: compressed-tensors")


def write_both(directory: Path, files: str) -> tuple[str, str]:
    """Write the quantised base, and an unquantised one of its dequantised weights."""
    plain: dict[str, Tensor] = {}
    base = write(directory / "base", files, plain)
    write_quantised(directory / "plain", FILES[files][0], lambda tensors: ({**tensors, **plain}, {}))
    config = json.loads((directory / "plain" / "config.json").read_text())
    del config["quantization_config"]
    (directory / "plain" / "config.json").write_text(json.dumps(config))
    return str(base), str(directory / "plain")


@pytest.mark.parametrize("files", ["INT4 groups, mixture", "FP8 tensors"])
def test_ten_steps_in_two_stages_equal_a_plain_loop_over_the_plain_weights(
    tmp_path: Path, files: str, workers: Workers
) -> None:
    base, plain_base = write_both(tmp_path, files)
    scale = Scale(vocabulary=128, sequence=32, sequences=43)
    compared = compare_with_plain(workers, Case("LoRA"), base, [Split(2)], 10, scale, plain_dir=plain_base)
    ((_, loss, weight),) = compared
    assert loss < LOSS_LIMIT
    assert weight < WEIGHT_LIMIT


@pytest.mark.parametrize("held", ["load_in_4bit", "load_in_fp8"])
@pytest.mark.filterwarnings("ignore:.*load_in_fp8")
def test_what_is_held_is_made_of_the_plain_weights(tmp_path: Path, held: str) -> None:
    found, expected = (
        [
            stage.state_dict()
            for stage in build(CausalLMLayers(base, dtype=torch.bfloat16, adapter=LoRA(4), **{held: True}), [0, 2, 4])
        ]
        for base in write_both(tmp_path, "INT4 groups, dense")
    )
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0)


def test_full_check_and_plan_read_them(tmp_path: Path) -> None:
    base, plain_base = write_both(tmp_path, "INT4 groups, mixture")
    full, plain = (
        [stage.state_dict() for stage in build(CausalLMLayers(each, dtype=torch.float32, adapter=Full()), [0, 2, 4])]
        for each in (base, plain_base)
    )
    for mine, expected in zip(full, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    assert check_model(Path(base), [2]).differences == []


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
        ({"group_size": 48}, "not divisible into groups"),
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("described", [True, False], ids=["described", "not described"])
def test_codes_of_fused_experts_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype, described: bool) -> None:
    config = compressed("float-quantized" if dtype.is_floating_point else "int-quantized", strategy="channel")({})[1]

    def fused(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        codes = {name: (8 * t).to(dtype) for name, t in tensors.items() if name.endswith("experts.down_proj")}
        scales = {f"{name}_scale": torch.ones(1) for name in codes}
        return {**tensors, **codes, **scales}, config if described else None

    write_quantised(tmp_path, "gpt_oss", fused)
    refusal = r"experts\.down_proj is stored as (F8_E4M3|I8); use a version of the model in"
    with pytest.raises(ConfigurationError, match=refusal):
        layers_of(tmp_path)


def zero_points_of_inputs(tensors: dict[str, Tensor]) -> None:
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    tensors.update({f"{name}.input_zero_point": torch.zeros(1, dtype=torch.int8) for name in names})


def test_merge_writes_bfloat16(tmp_path: Path) -> None:
    base, plain_base = write_both(tmp_path, "INT4 groups, dense")
    edit_tensors(Path(base), zero_points_of_inputs)
    layers = layers_of(Path(base))
    stages = build(layers, [0, 2, 4])
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    layers.adapter.save(
        tmp_path / "adapter", [layers.trained_state(stage) for stage in stages], layers.meta_model.model_dir
    )
    told = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert told.endswith("the merged weights are in bfloat16.")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    written = {name for path in (tmp_path / "merged").glob("*.safetensors") for name in load_file(path)}
    assert written == layers.meta_model.model.state_dict().keys()
    merge(plain_base, str(tmp_path / "adapter"), str(tmp_path / "plain merged"), allow_another_base=True)
    merged, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).state_dict()
        for name in ("merged", "plain merged")
    )
    torch.testing.assert_close(merged, expected, rtol=0, atol=0)
    assert not torch.equal(
        expected["model.layers.1.self_attn.o_proj.weight"],
        AutoModelForCausalLM.from_pretrained(plain_base, dtype=torch.bfloat16).model.layers[1].self_attn.o_proj.weight,
    )


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    shard = write(tmp_path, "INT4 groups, dense") / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match="model-00002-of-00002"):
        layers_of(tmp_path)
