"""Quantised bases: how they are read, held, trained and saved, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from exact_comparison import compare_with_plain
from exact_training import LOSS_LIMIT, WEIGHT_LIMIT, Case, Scale, Split
from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import merge
from lightning_pipelite.kernels.fp8_rows import dequantise_rows, quantise_rows
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.fingerprint import fingerprint
from lightning_pipelite.models.stored.fp8 import Fp8
from lightning_pipelite.models.stored.known import stored_format
from lightning_pipelite.models.stored.weights import StoredWeights
from processes import Workers
from quantised_files import compressed, edit_config, edit_tensors, fp8, mxfp4, write_quantised
from tiny_models import build, held

Quantise = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Any]]]
FILES: dict[str, tuple[str, Quantise]] = {
    "MXFP4 gpt-oss": ("gpt_oss", mxfp4),
    "MXFP4 gpt-oss, tied": ("gpt_oss_wide", mxfp4),
    "FP8 blocks, dense": ("llama", fp8()),
    "FP8 blocks, oblong": ("qwen3", fp8((16, 64))),
    "FP8 blocks, mixture": ("mixtral", fp8()),
    "FP8 blocks, powers of two": ("qwen3_moe", fp8(scale_fmt="ue8m0")),
    "FP8 tensors, dense": ("qwen3", fp8(None, scheme="static")),
    "FP8 tensors, mixture": ("mixtral", fp8(None)),
}
FEW = ("MXFP4 gpt-oss", "FP8 blocks, dense", "FP8 blocks, mixture")
TRAINED = Scale(vocabulary=128, sequence=32, sequences=43)


def write(directory: Path, files: str) -> Path:
    kind, quantise = FILES[files]
    return write_quantised(directory, kind, quantise)


def layers_of(directory: Path, adapter: Any = None, **options: Any) -> CausalLMLayers:
    adapter = adapter or LoRA(4, target_modules=["o_proj"])
    return CausalLMLayers(directory, **{"dtype": torch.float32, "adapter": adapter, **options})


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_stages_hold_what_transformers_dequantises(tmp_path: Path, files: str, dtype: torch.dtype) -> None:
    write(tmp_path, files)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    layers = layers_of(tmp_path, dtype=dtype)
    found = held(layers)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # With dtype float32, transformers leaves bfloat16 what is not in FP8.
        torch.testing.assert_close(found[name], tensor.to(dtype), rtol=0, atol=0, msg=name)
    assert layers.weights_told == (
        f"weights: {layers.meta_model.stored.title} on disk, held in {str(dtype).removeprefix('torch.')}"  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("files", FEW)
def test_nf4_is_made_of_the_dequantised_weights(tmp_path: Path, files: str) -> None:
    write(tmp_path, files)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    layers = layers_of(tmp_path, dtype=torch.bfloat16, load_in_4bit=True)
    assert str(layers.weights_told).endswith("on disk, held in nf4")
    found = held(layers)
    quantised = [name for name, tensor in found.items() if tensor.dtype == torch.uint8 and "absmax" not in name]
    quantised = [name for name in quantised if "quant" not in name]
    assert len(quantised) >= 4 * (6 if "gpt" in files else 4)
    for name in quantised:
        plain = name.replace("parametrizations.", "").removesuffix(".original")
        assert torch.equal(found[name].flatten(), quantize_4bit(expected[plain], quant_type="nf4")[0].flatten()), name


def test_fp8_is_made_of_the_dequantised_weights(tmp_path: Path) -> None:
    write(tmp_path, "FP8 blocks, dense")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    layers = layers_of(tmp_path, dtype=torch.bfloat16, load_in_fp8=True)
    assert str(layers.weights_told).endswith("on disk, held in FP8 with new per-row scales")
    with pytest.warns(UserWarning, match="load_in_fp8"):
        stages = build(layers, [0, 2, 4])
    for name in ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.q_proj"):
        found = stages[int(name.split(".")[2]) // 2].causal_lm.get_submodule(name).weight
        plain = dequantise_rows(*quantise_rows(expected[name + ".weight"]), torch.bfloat16)
        torch.testing.assert_close(found, plain, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("by", ["tensor", "row"])
@pytest.mark.filterwarnings("ignore:.*load_in_fp8")
def test_fp8_with_a_scale_by_tensor_or_row_is_held_as_it_is(tmp_path: Path, by: str) -> None:
    quantise = fp8(None, scheme="static") if by == "tensor" else compressed("float-quantized", strategy="channel")
    write_quantised(tmp_path, "qwen3", quantise)
    layers = layers_of(tmp_path, dtype=torch.bfloat16, load_in_fp8=True)
    assert str(layers.weights_told).endswith("on disk, held as stored")
    stages = build(layers, [0, 2, 4])
    stored = {name: t for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    for name in ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.o_proj"):
        found = stages[int(name.split(".")[2]) // 2].causal_lm.get_submodule(name)
        found = getattr(found, "base_layer", found)
        scales = stored[f"{name}.weight_scale" + ("_inv" if by == "tensor" else "")].float().flatten()
        torch.testing.assert_close(found.codes, stored[f"{name}.weight"].view(torch.uint8), rtol=0, atol=0)
        torch.testing.assert_close(found.scales, scales.expand(found.codes.shape[0]), rtol=0, atol=0)
    damaged = replace("model.layers.3.mlp.up_proj.weight", lambda t: torch.full_like(t.float(), torch.nan).to(t.dtype))
    edit_tensors(tmp_path, damaged)
    with pytest.raises(ConfigurationError, match=r"layers\.3\.mlp\.up_proj\.weight holds values that are nan"):
        layers_of(tmp_path, dtype=torch.bfloat16, load_in_fp8=True).build_stage(2, 4, torch.device("cpu"))


def test_a_stage_reads_its_own_weights_one_layers_experts_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "MXFP4 gpt-oss")
    layers = layers_of(tmp_path)
    read: list[str] = []
    tensor = StoredWeights._tensor

    def noted(self: StoredWeights, name: str, device: Any) -> Tensor:
        read.append(name)
        return tensor(self, name, device)

    monkeypatch.setattr(StoredWeights, "_tensor", noted)
    layers.build_stage(2, 4, torch.device("cpu"))
    assert read == list(dict.fromkeys(read))
    of_layers = {name for name in read if name.startswith("model.layers.")}
    assert {name.split(".")[2] for name in of_layers} == {"2", "3"}
    assert set(read) - of_layers == {"model.norm.weight", "lm_head.weight"}


TRAININGS = {"MXFP4 gpt-oss": ("q_proj", "o_proj"), "FP8 blocks, dense": (), "FP8 blocks, mixture": ()}


@pytest.mark.parametrize("files", TRAININGS)
def test_ten_steps_in_two_stages_equal_a_plain_loop_over_the_dequantised_model(
    tmp_path: Path, files: str, workers: Workers
) -> None:
    base = str(write(tmp_path / "base", files))
    case = Case("LoRA", targets=TRAININGS[files])
    splits, alone = [Split(2)], "gpt" in files  # in transformers, the packed documents of gpt-oss attend to each other
    ((_, loss, weight),) = compare_with_plain(workers, case, base, splits, 10, TRAINED, alone=alone)
    assert loss < LOSS_LIMIT
    assert weight < WEIGHT_LIMIT


def random_adapter(layers: CausalLMLayers, directory: Path) -> list[Any]:
    """Save a LoRA with random values, and return the stages that hold it."""
    stages = build(layers, [0, 2, 4])
    generator = torch.Generator().manual_seed(1)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    layers.adapter.save(directory, [layers.trained_state(stage) for stage in stages], layers.meta_model.model_dir)
    return stages


@torch.no_grad()
def logits_of(stages: list[Any]) -> Tensor:
    hidden: Any = (INPUT_IDS, torch.arange(8).expand(2, -1))
    for stage in stages:
        hidden = stage.eval()(hidden)
    return hidden


INPUT_IDS = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("files", FEW)
def test_adapter_gives_the_trained_logits_and_merges_into_bfloat16(tmp_path: Path, files: str) -> None:
    base = write(tmp_path / "base", files)
    fused = "gpt" in files or "mixture" in files
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"] if fused else ["q_proj", "down_proj"]
    layers = layers_of(base, LoRA(4, target_modules=targets))
    wanted = logits_of(random_adapter(layers, tmp_path / "adapter"))
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).float()
    before = whole.eval()(input_ids=INPUT_IDS).logits.detach()
    with torch.no_grad():
        found = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()(input_ids=INPUT_IDS).logits
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    told = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert told.endswith(f"The base is in {stored_format(base).title}; the merged weights are in bfloat16.")  # type: ignore[union-attr]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()
    changed = PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        # Both add in float32, but in different orders.
        torch.testing.assert_close(tensor, changed[name].to(torch.bfloat16).float(), rtol=2**-7, atol=1e-5, msg=name)


def test_full_starts_from_the_dequantised_weights_and_saves_them_in_plain(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "FP8 blocks, mixture")
    layers = layers_of(base, Full())
    stages = build(layers, [0, 2, 4])
    layers.adapter.save(tmp_path / "saved", [layers.trained_state(stage) for stage in stages], base)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(saved[name], tensor.float(), rtol=0, atol=0, msg=name)


def test_check_compares_split_and_whole(tmp_path: Path) -> None:
    report = check_model(write(tmp_path, "FP8 blocks, dense"), [2])
    assert report.differences == []


def test_fingerprint_knows_the_format_and_its_codes(tmp_path: Path) -> None:
    base = write(tmp_path, "FP8 blocks, dense")
    first = fingerprint(base)
    edit_config(base, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    assert fingerprint(base) != first


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(old)]:
            tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return edit


def replace(name: str, make: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        if name in tensors and (made := make(tensors.pop(name))) is not None:
            tensors[name] = made

    return edit


UP = "model.layers.1.mlp.up_proj.weight"
EXPERTS = "model.layers.2.mlp.experts.down_proj"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "no scale": ("FP8 blocks, dense", replace(UP + "_scale_inv", lambda _: None), UP),
    "a scale of no weight": ("FP8 blocks, dense", replace(UP, lambda _: None), UP),
    "scale of another shape": ("FP8 blocks, dense", replace(UP + "_scale_inv", lambda s: s[:-1]), UP),
    "scale of another type": ("FP8 blocks, dense", replace(UP + "_scale_inv", lambda s: s.to(torch.int32)), UP),
    "many scales for one": ("FP8 tensors, dense", replace(UP + "_scale_inv", lambda s: s.expand(2)), UP),
    "no exponents": ("MXFP4 gpt-oss", replace(EXPERTS + "_scales", lambda _: None), EXPERTS),
    "no blocks": ("MXFP4 gpt-oss", replace(EXPERTS + "_blocks", lambda _: None), EXPERTS),
    "fewer exponents": ("MXFP4 gpt-oss", replace(EXPERTS + "_scales", lambda s: s[..., :-1]), EXPERTS),
    "blocks of another size": ("MXFP4 gpt-oss", replace(EXPERTS + "_blocks", lambda b: b[..., :8]), EXPERTS),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weight_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    files, edit, named = DAMAGES[damage]
    write(tmp_path, files)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ConfigurationError, match=named):
        layers_of(tmp_path)


def test_blocks_that_do_not_divide_are_refused_where_libraries_differ(tmp_path: Path) -> None:
    write(tmp_path, "FP8 blocks, dense")
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [48, 32]})
    edit_tensors(tmp_path, lambda tensors: [tensors.update({n: torch.ones(-(-t.shape[0] * 32 // 48), t.shape[1])})
                                            for n, t in list(tensors.items()) if n.endswith("scale_inv")])  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"weight .*which is not divisible into blocks of \[48, 32\]"):
        layers_of(tmp_path)


def test_a_last_block_may_be_smaller() -> None:
    """As in DeepSeek's files: 576 rows in blocks of 128."""
    codes = torch.randn(576, 256).to(torch.float8_e4m3fn)
    scales = 0.01 + torch.rand(5, 2)
    entries = {
        "a.weight": {"dtype": "F8_E4M3", "shape": [576, 256]},
        "a.weight_scale_inv": {"dtype": "F32", "shape": [5, 2]},
    }
    (weight,) = Fp8({"quant_method": "fp8"}).find(entries, {}.__getitem__)
    factors = scales.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)
    assert torch.equal(weight.dequantise([codes, scales], torch.float32), codes.float() * factors)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "MXFP4 gpt-oss")
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match="model-00002-of-00002"):
        layers_of(tmp_path)


@pytest.mark.parametrize(
    ("described", "told"),
    [
        ({"quant_method": "hqq"}, "quant_method hqq"),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": ["fp8"]}, "quant_method \\['fp8'\\]"),
        (
            {"quant_method": "compressed-tensors", "format": [], "config_groups": {"g": {"weights": {"num_bits": 8}}}},
            "weights of type int in 8 bits is not supported",
        ),
        ({"quant_method": "fp8", "rotation": "hadamard"}, "rotation"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "mxfp4", "block_size": 16}, "block_size"),
    ],
    ids=["method", "no method", "no text", "format", "key", "expert_dtype", "fmt", "block", "mxfp4 key"],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, described: Any, told: str) -> None:
    write(tmp_path, "FP8 blocks, dense")
    edit_config(tmp_path, quantization_config=described)
    with pytest.raises(ConfigurationError, match=told):
        layers_of(tmp_path)
