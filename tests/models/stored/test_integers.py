"""Bases quantised by GPTQ and AWQ: which files are read, and which are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from integer_files import awq, gptq
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import merge
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.stored.gptq import Gptq
from lightning_pipelite.models.stored.known import stored_format
from lightning_pipelite.models.stored.weights import StoredWeights
from quantised_files import Tensors, edit_config, edit_tensors, write_quantised
from tiny_models import build

GPTQ: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": ("llama", {}),
    "4 bits, mixture": ("mixtral", {"desc_act": True, "sym": False}),
    "2 bits": ("qwen3", {"bits": 2, "group_size": 16, "sym": False}),
    "3 bits, all inputs": ("llama", {"bits": 3, "group_size": -1, "sym": False}),
    "3 bits, act order": ("qwen3", {"bits": 3, "desc_act": True}),
    "8 bits, version 2": ("llama", {"bits": 8, "sym": False, "version": 2}),
    "4 bits, no order": ("qwen3", {"g_idx": False}),
    "4 bits, biases of zeros": ("llama", {"biases": True}),
}
AWQ: dict[str, tuple[str, dict[str, Any]]] = {
    "AWQ": ("llama", {}),
    "AWQ, all inputs": ("qwen3", {"group_size": -1}),
    "AWQ, mixture": ("qwen3_moe", {}),
}
STEM = "model.layers.1.mlp.up_proj"


def write(directory: Path, files: str, plain: Tensors | None = None) -> Path:
    kind, options = {**GPTQ, **AWQ}[files]
    quantise = gptq if files in GPTQ else awq
    return write_quantised(directory, kind, quantise(plain=plain, **options))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files that are written once for all tests, which must not change them."""
    return cache(lambda files: write(tmp_path_factory.mktemp("base"), files))


@pytest.fixture
def copied(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda files: shutil.copytree(written(files), tmp_path / "copy")


def read_headers(directory: Path) -> StoredWeights:
    return StoredWeights(directory, stored_format(directory))


def layers_of(directory: Path, **options: Any) -> CausalLMLayers:
    adapter = LoRA(4, target_modules=["o_proj"])
    return CausalLMLayers(directory, **{"dtype": torch.bfloat16, "adapter": adapter, **options})


@pytest.mark.parametrize("files", [*GPTQ, *AWQ])
def test_stages_hold_what_the_codes_stand_for(tmp_path: Path, files: str) -> None:
    plain: Tensors = {}
    layers = layers_of(write(tmp_path, files, plain))
    found = {
        name.replace(".base_layer", ""): tensor
        for stage in build(layers, [0, 2, 4])
        for name, tensor in stage.causal_lm.state_dict().items()
    }
    for name, tensor in plain.items():
        if "experts" not in name:
            torch.testing.assert_close(found[name], tensor.to(torch.bfloat16), rtol=0, atol=0, msg=name)
        elif name.endswith(("experts.3.down_proj.weight", "experts.3.w2.weight")):
            fused = found[name.split(".experts.")[0].replace("block_sparse_moe", "mlp") + ".experts.down_proj"]
            torch.testing.assert_close(fused[3], tensor.to(torch.bfloat16), rtol=0, atol=0, msg=name)
    assert len(plain) >= 28
    title = f"{GPTQ[files][1].get('bits', 4)}-bit GPTQ" if files in GPTQ else "4-bit AWQ"
    assert layers.weights_told == f"weights: {title} on disk, held in bfloat16"


def test_4_bits_are_made_of_what_the_codes_stand_for_and_check_agrees(tmp_path: Path) -> None:
    plain: Tensors = {}
    write(tmp_path, "4 bits", plain)
    stage = build(layers_of(tmp_path, load_in_4bit=True, dtype=torch.float32), [0, 4])[0]
    linear: Any = stage.causal_lm.get_submodule(STEM)
    assert torch.equal(linear.weight.data, quantize_4bit(plain[f"{STEM}.weight"].float(), quant_type="nf4")[0])
    assert check_model(tmp_path, [2]).differences == []


def test_merge_leaves_out_the_biases_that_packers_added(tmp_path: Path) -> None:
    plain: Tensors = {}
    base = write(tmp_path / "base", "4 bits, biases of zeros", plain)
    layers = layers_of(base)
    stages = build(layers, [0, 4])
    layers.adapter.save(tmp_path / "adapter", [layers.trained_state(stage) for stage in stages], base)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    written = {
        name: tensor for path in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert written.keys() == layers.meta_model.model.state_dict().keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(written[name], tensor.to(torch.bfloat16), rtol=0, atol=0, msg=name)


def change(end: str, make: Any) -> Any:
    def edit(tensors: Tensors) -> None:
        if STEM + end in tensors and (made := make(tensors.pop(STEM + end))) is not None:
            tensors[STEM + end] = made

    return edit


@pytest.mark.parametrize(
    ("files", "edit", "told"),
    [
        ("4 bits", change(".scales", lambda _: None), "lacks its tensor"),
        ("4 bits", change(".qzeros", lambda _: None), "lacks its tensor"),
        ("4 bits", change(".qweight", lambda _: None), "does not belong to any qweight"),
        ("3 bits, act order", change(".g_idx", lambda _: None), "lacks its tensor"),
        ("4 bits", change(".scales", lambda t: t[:, :-8]), "to have shape"),
        ("4 bits", change(".qzeros", lambda t: t.float()), "in F32"),
        ("3 bits, act order", change(".qweight", lambda t: t[:-1]), "must be a matrix of 3-bit codes"),
        ("AWQ", change(".qzeros", lambda _: None), "lacks its tensor"),
        ("AWQ", change(".scales", lambda t: t[:-1]), "to have shape"),
        ("4 bits", lambda tensors: tensors.update({f"{STEM}.perm": torch.ones(8)}), "an additional tensor .*perm"),
        ("AWQ", lambda t: t.update({"model.layers.1.mlp.act.scales": torch.ones(8)}), "does not belong to any qweight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_weight_is_refused_by_name(copied: Callable[[str], Path], files: str, edit: Any, told: str) -> None:
    base = copied(files)
    edit_tensors(base, edit)
    with pytest.raises(ConfigurationError, match=rf"model\.layers\.1\.mlp\..*{told}"):
        read_headers(base)


def with_bias(tensors: Tensors) -> None:
    if f"{STEM}.bias" in tensors:
        tensors[f"{STEM}.bias"][3] = 0.5


def test_a_bias_that_the_model_has_not_is_refused_unless_it_is_zero(copied: Callable[[str], Path]) -> None:
    base = copied("4 bits, biases of zeros")
    edit_tensors(base, with_bias)
    with pytest.raises(ConfigurationError, match=rf"{STEM}\.bias, which the model"):
        layers_of(base)


@pytest.mark.parametrize(
    ("files", "end", "made", "told"),
    [
        ("3 bits, act order", ".g_idx", lambda t: t + 9, "inputs outside its 2 groups"),
        ("4 bits", ".g_idx", lambda t: t.flip(0), "desc_act is false"),
        ("4 bits", ".qzeros", lambda t: torch.full_like(t, -1), "zero points of 0, stored minus one"),
    ],
    ids=["groups", "order", "zero points"],
)
def test_what_libraries_read_in_different_ways_is_refused(
    copied: Callable[[str], Path], files: str, end: str, made: Any, told: str
) -> None:
    base = copied(files)
    edit_tensors(base, change(end, made))
    with pytest.raises(ConfigurationError, match=rf"{STEM}\.weight .*{told}"):
        read_headers(base).read(f"{STEM}.weight")


@pytest.mark.parametrize(
    ("files", "changes", "told"),
    [
        ("4 bits", {"bits": 5}, "bits is 5"),
        ("4 bits", {"group_size": 48}, "not divisible into groups of 48"),
        ("4 bits", {"group_size": 0}, "group_size is 0"),
        ("4 bits", {"checkpoint_format": "marlin"}, "'marlin'"),
        ("4 bits", {"format": "gptq", "checkpoint_format": "gptq_v2"}, "contradict"),
        ("4 bits", {"dynamic": {r".*\.up_proj.*": {"bits": 8}}}, "dynamic"),
        ("4 bits", {"pack_dtype": "int8"}, "pack_dtype"),
        ("4 bits", {"rotation": "hadamard"}, "rotation"),
        ("AWQ", {"version": "gemv"}, "version is 'gemv'"),
        ("AWQ", {"version": "exllama"}, "version is 'exllama'"),
        ("AWQ", {"backend": "llm-awq"}, "backend"),
        ("AWQ", {"zero_point": False}, "zero_point"),
        ("AWQ", {"bits": 8}, "bits is 8"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(
    copied: Callable[[str], Path], files: str, changes: dict[str, Any], told: str
) -> None:
    base = copied(files)
    described = (gptq if files in GPTQ else awq)()({})[1]
    edit_config(base, quantization_config={**described, **changes})
    with pytest.raises(ConfigurationError, match=told):
        read_headers(base)


def test_layers_that_are_left_out_are_told_by_the_files() -> None:
    described = gptq(dynamic={"-:.*lm_head.*": {}}, meta={"quantizer": ["gptqmodel:7.7.0"]}, lm_head=False)({})[1]
    assert Gptq(described).bits == 4 + 20 / 32


def test_conv1d_is_refused_as_its_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32)).save_pretrained(
        tmp_path
    )
    edit_config(tmp_path, quantization_config=gptq()({})[1])
    with pytest.raises(ConfigurationError, match="4-bit GPTQ, which is not supported for models with Conv1D"):
        layers_of(tmp_path)
