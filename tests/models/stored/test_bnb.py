"""Bases quantised by bitsandbytes: held as stored or dequantised, and which files are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from exact_comparison import compare_with_plain
from exact_training import LOSS_LIMIT, WEIGHT_LIMIT, Case, Scale, Split
from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import merge
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.stored.known import stored_format
from lightning_pipelite.models.stored.weights import StoredWeights
from processes import Workers
from quantised_files import CONFIGS, edit_config
from tiny_models import build, held

FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4, nested": (
        "qwen3", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "nf4, mixture": ("mixtral", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4, stored in bfloat16": (
        "llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    ),
    "fp4": ("qwen3", {"load_in_4bit": True}),
    "int8": ("llama", {"load_in_8bit": True}),
}  # fmt: skip
FOUR_BITS = [files for files in FILES if files != "int8"]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models quantised and saved by transformers, except for lm_head and one layer's up_proj."""
    made = {}
    for files, (kind, options) in FILES.items():
        directory = tmp_path_factory.mktemp("base")
        torch.manual_seed(0)
        dtype = torch.float32 if files == "nf4, nested" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
        model.save_pretrained(directory / "plain")
        skipped = ["lm_head", "model.layers.3.mlp.up_proj"]
        config = BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped)
        AutoModelForCausalLM.from_pretrained(
            directory / "plain", quantization_config=config, dtype=dtype
        ).save_pretrained(directory / "quantised")
        made[files] = directory / "quantised"
    return made


def layers_of(directory: Path, **options: Any) -> CausalLMLayers:
    adapter = LoRA(4, target_modules=["q_proj", "o_proj"])
    return CausalLMLayers(directory, **{"dtype": torch.bfloat16, "adapter": adapter, **options})


@pytest.mark.parametrize("files", FOUR_BITS)
def test_load_in_4bit_holds_the_codes_and_scales_of_the_files(written: dict[str, Path], files: str) -> None:
    layers = layers_of(written[files], load_in_4bit=True)
    found = held(layers)
    stored = load_file(written[files] / "model.safetensors")
    kept = [name for name in stored if name.endswith(".absmax") and "nested" not in name]
    assert len(kept) >= 16
    for name in (name.removesuffix(".absmax") for name in kept):
        codes = stored[name].contiguous().view(torch.uint8).reshape(-1, 1)
        torch.testing.assert_close(found[name], codes, rtol=0, atol=0, msg=name)
        for end in ("absmax", "nested_absmax", "nested_quant_map", "quant_map"):
            assert (f"{name}.{end}" in found) == (f"{name}.{end}" in stored)
            if f"{name}.{end}" in stored:
                torch.testing.assert_close(found[f"{name}.{end}"], stored[f"{name}.{end}"], rtol=0, atol=0, msg=name)
    if "mixture" not in files:  # what the files store unquantised stays so
        name = "model.layers.3.mlp.up_proj.weight"
        torch.testing.assert_close(found[name], stored[name].bfloat16(), rtol=0, atol=0)
    kind = files.split(",")[0]
    fused = ", fused experts in nf4" if "mixture" in files else ""
    assert layers.weights_told == f"weights: bitsandbytes {kind} on disk, held as stored{fused}"


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_else_stages_hold_what_transformers_dequantises(
    written: dict[str, Path], files: str, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(written[files], dtype=dtype)
    expected = model.dequantize(dtype=dtype).state_dict()
    found = held(layers_of(written[files], dtype=dtype))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.to(dtype), rtol=0, atol=0, msg=name)


def test_stages_without_weights_have_the_same_tensors(written: dict[str, Path]) -> None:
    layers = layers_of(written["nf4, nested"], load_in_4bit=True)
    sizes = []
    for kind in ("cpu", "meta"):
        stage: Any = layers.build_stage(0, 4, torch.device(kind))
        sizes.append({name: (tensor.shape, tensor.dtype) for name, tensor in stage.named_parameters()})
        state = stage.causal_lm.get_parameter("model.layers.0.mlp.down_proj.weight").quant_state
        sizes[-1]["scales"] = (state.absmax.shape, state.absmax.dtype, state.state2.absmax.shape)
    assert sizes[0] == sizes[1]


def test_ten_steps_in_two_stages_equal_a_plain_loop_over_the_base_as_transformers_loads_it(
    written: dict[str, Path], workers: Workers
) -> None:
    case, scale, base = Case("LoRA", in_4bit=True), Scale(vocabulary=128, sequence=32, sequences=43), "nf4, nested"
    ((_, loss, weight),) = compare_with_plain(workers, case, str(written[base]), [Split(2)], 10, scale)
    assert loss < LOSS_LIMIT
    assert weight < WEIGHT_LIMIT


def test_an_adapter_gives_the_trained_logits_on_the_base_as_transformers_loads_it(
    written: dict[str, Path], tmp_path: Path
) -> None:
    base = written["nf4, nested"]
    layers = layers_of(base, load_in_4bit=True)
    stages = build(layers, [0, 2, 4])
    generator = torch.Generator().manual_seed(1)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    layers.adapter.save(tmp_path / "adapter", [layers.trained_state(stage) for stage in stages], base)
    hidden: Any = (torch.arange(8).repeat(2, 1), torch.arange(8).expand(2, -1))
    with torch.no_grad():
        for stage in stages:
            hidden = stage(hidden)
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        before = whole.train()(input_ids=torch.arange(8).repeat(2, 1)).logits
        model = PeftModel.from_pretrained(whole, tmp_path / "adapter").train()
        found = model(input_ids=torch.arange(8).repeat(2, 1)).logits
    assert (found - before).abs().max() > 0.1
    torch.testing.assert_close(hidden.float(), found.float(), rtol=0, atol=0.05)
    told = merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert told.endswith("The base is in bitsandbytes nf4; the merged weights are in bfloat16.")


def test_experts_that_were_saved_one_by_one_are_fused(written: dict[str, Path], tmp_path: Path) -> None:
    """Older versions of transformers quantised and saved them so."""
    base = shutil.copytree(written["nf4, mixture"], tmp_path / "base")
    made: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".experts." in name and tensor.is_floating_point():
            codes, how = quantize_4bit(tensor, quant_type="nf4")
            made |= {name: codes, **{f"{name}.{end}": part for end, part in how.as_dict(packed=True).items()}}
        else:
            made[name] = tensor
    save_file(made, base / "model.safetensors")
    down = "model.layers.1.mlp.experts.down_proj"
    (name,) = (name for name in made if name.endswith("layers.1.block_sparse_moe.experts.2.w2.weight"))
    expected = StoredWeights(base, stored_format(base)).read(name)
    torch.testing.assert_close(held(layers_of(base))[down][2], expected, rtol=0, atol=0)
    experts: Any = build(layers_of(base, load_in_4bit=True), [0, 4])[0].causal_lm.get_submodule(down.rpartition(".")[0])
    assert torch.equal(experts.parametrizations.down_proj.original.view(4, -1)[2], made[name].flatten())


def test_check_and_full_start_from_the_dequantised_weights(written: dict[str, Path]) -> None:
    assert check_model(written["nf4"], [2]).differences == []
    (stage,) = build(layers_of(written["int8"], adapter=Full(), dtype=torch.float32), [0, 4])
    expected = AutoModelForCausalLM.from_pretrained(written["int8"], dtype=torch.float32).dequantize(torch.float32)
    torch.testing.assert_close(stage.causal_lm.state_dict()[UP], expected.state_dict()[UP], rtol=0, atol=0)


def edit(source: Path, target: Path, name: str, make: Any) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    if (made := make(tensors.pop(name))) is not None:
        tensors[name] = made
    save_file(tensors, target / "model.safetensors")
    return target


def state(**changes: Any) -> Any:
    def make(tensor: Tensor) -> Tensor:
        described = {**json.loads(bytes(tensor.tolist())), **changes}
        return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

    return make


STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("files", "name", "make", "told"),
    [
        ("nf4", f"{UP}.absmax", lambda _: None, "lacks its tensor"),
        ("nf4", f"{UP}.quant_map", lambda _: None, "lacks its tensor"),
        ("nf4", STATE, lambda _: None, "lacks the tensors that describe its codes"),
        ("nf4", UP, lambda _: None, "lacks its tensor"),
        ("nf4", UP, lambda t: t[:-1], "has codes of shape"),
        ("nf4", f"{UP}.absmax", lambda t: t[:-1], "to have shape"),
        ("nf4", f"{UP}.absmax", lambda t: t.to(torch.uint8), "in U8"),
        ("nf4", STATE, lambda t: t[:-3], "cannot be read"),
        ("nf4", STATE, state(blocksize=48), "has blocksize 48"),
        ("nf4", STATE, state(rotated=True), "has rotated True"),
        ("nf4", STATE, state(quant_type="fp4"), "does not describe its codes"),
        ("nf4", STATE, state(shape=[64]), "does not describe its codes"),
        ("nf4, nested", STATE, state(nested_blocksize=128), "nested_blocksize 128"),
        ("nf4, nested", f"{UP}.nested_absmax", lambda _: None, "lacks its tensor"),
        ("int8", "model.layers.1.mlp.up_proj.SCB", lambda _: None, "lacks the tensors that describe its codes"),
        ("int8", "model.layers.1.mlp.up_proj.SCB", lambda t: t[:-1], "to have shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_weight_is_refused_by_name(
    written: dict[str, Path], tmp_path: Path, files: str, name: str, make: Any, told: str
) -> None:
    base = edit(written[files], tmp_path / "base", name, make)
    with pytest.raises(ConfigurationError, match=rf"model\.layers\.1\.mlp\.up_proj.*{told}"):
        StoredWeights(base, stored_format(base))


@pytest.mark.parametrize(
    ("files", "name", "make", "told"),
    [
        ("nf4", f"{UP}.quant_map", lambda t: t.flip(0), "not those of nf4"),
        ("int8", "model.layers.1.mlp.up_proj.weight_format", lambda t: t + 1, "one kind of GPU"),
    ],
    ids=["values", "layout"],
)
def test_values_that_would_be_read_otherwise_are_refused(
    written: dict[str, Path], tmp_path: Path, files: str, name: str, make: Any, told: str
) -> None:
    base = edit(written[files], tmp_path / "base", name, make)
    with pytest.raises(ConfigurationError, match=told):
        StoredWeights(base, stored_format(base)).read(UP)


def test_options_that_are_not_known_are_refused(written: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(written["nf4"], tmp_path / "base")
    with pytest.raises(ConfigurationError, match="bnb_4bit_use_double_quant: the files"):
        layers_of(base, load_in_4bit=True, bnb_4bit_use_double_quant=True)
    for described, told in (({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "af4"),
                            ({"load_in_4bit": True, "rotation": 1}, "rotation"),
                            ({}, "neither or both")):  # fmt: skip
        edit_config(base, quantization_config={"quant_method": "bitsandbytes", **described})
        with pytest.raises(ConfigurationError, match=told):
            stored_format(base)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((48, 160), 64), ((6, 80), 32), ((7, 33), 128), ((8, 256), 64)])
def test_blocks_go_over_from_a_row_into_the_next(
    tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int], size: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = quantize_4bit(weight, blocksize=size, quant_type=kind, compress_statistics=nested)
    stored = {"m.weight": codes, **{f"m.weight.{name}": part for name, part in state.as_dict(packed=True).items()}}
    save_file(stored, tmp_path / "model.safetensors")
    described = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": described}))
    found = StoredWeights(tmp_path, stored_format(tmp_path)).read("m.weight", torch.float32)
    scales = state.absmax.tolist()
    if nested:
        outer = state.state2
        scales = [float(outer.code[int(code)] * outer.absmax[0] + state.offset) for code in scales]
    digits = [digit for byte in codes.flatten().tolist() for digit in (byte // 16, byte % 16)]
    values = [float(torch.tensor(scales[n // size]) * state.code[digits[n]]) for n in range(weight.numel())]
    assert torch.equal(found, torch.tensor(values).bfloat16().float().reshape(shape))
