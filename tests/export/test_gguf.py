"""GGUF files, read with the gguf library and compared with its name maps and with rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    ApertusConfig,
    ArceeConfig,
    Cohere2Config,
    Exaone4Config,
    GemmaConfig,
    GraniteConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    OlmoeConfig,
    Qwen2Config,
    SeedOssConfig,
    SmolLM3Config,
)

from export_cases import (
    BASES,
    FUSED,
    load,
    logits,
    with_adapter,
    with_control,
    write_adapter,
    write_base,
    write_control_adapter,
)
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import control_to_lora, export_gguf, merge
from lightning_pipelite.export.architectures import PERMUTED, PLAIN
from lightning_pipelite.export.gguf import permute

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
MORE = {
    "apertus": ApertusConfig,
    "arcee": ArceeConfig,
    "cohere2": Cohere2Config,
    "exaone4": Exaone4Config,
    "gemma": GemmaConfig,
    "granite": GraniteConfig,
    "nemotron": NemotronConfig,
    "olmo": OlmoConfig,
    "olmo2": Olmo2Config,
    "qwen2": Qwen2Config,
    "seed_oss": SeedOssConfig,
    "smollm3": SmolLM3Config,
}
BASES.update({name: kind(**SIZES) for name, kind in MORE.items()})
BASES["olmoe"] = OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)
DENSE = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi", "phi3", "cohere", "starcoder2", "gpt2"]
DENSE += list(MORE)
MOE = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"]


def _tensors(path: Path) -> dict[str, np.ndarray]:
    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}


def _field(path: Path, name: str) -> Any:
    field = gguf.GGUFReader(path).fields[name]
    return field.contents()


@pytest.mark.parametrize("kind", DENSE)
def test_names_and_values_of_dense_models(kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    output = tmp_path / "adapter.gguf"
    export_gguf(str(adapter), str(base), str(output))
    config = BASES[kind]
    name = (PLAIN | PERMUTED)[config.model_type]
    assert _field(output, "general.architecture") == name
    assert (_field(output, "general.type"), _field(output, "adapter.type")) == ("adapter", "lora")
    assert _field(output, "adapter.lora.alpha") == 8
    (arch,) = [each for each, its_name in gguf.MODEL_ARCH_NAMES.items() if its_name == name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found, lora = _tensors(output), load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    wanted: dict[str, torch.Tensor] = {}
    for key, a in lora.items():
        if ".lora_A" in key:
            file = key.removeprefix("base_model.model.").replace(".lora_A", "")
            b = lora[key.replace("_A", "_B")]
            rows = torch.arange(len(b))
            if config.model_type in PERMUTED and ("q_proj" in key or "k_proj" in key):
                heads = 4 if "q_proj" in key else 2
                half = len(b) // heads // 2  # llama.cpp pairs neighbours, Hugging Face the two halves of a head
                rows = torch.stack([rows.view(heads, 2, half)[:, 0], rows.view(heads, 2, half)[:, 1]], -1).flatten()
            target = names.get_name(file, (".weight",))
            assert target is not None
            wanted |= {f"{target}.lora_a": a, f"{target}.lora_b": b[rows]}
            shape = weights[file].shape if kind != "gpt2" else weights[file].T.shape
            assert (len(b), a.shape[1]) == tuple(shape)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[each], wanted[each].numpy()) for each in found)


@pytest.mark.parametrize("kind", MOE)
def test_names_and_values_of_experts(kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind)
    modules = ["shared_expert.down_proj"] if kind == "qwen2_moe" else ["o_proj"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=modules, target_parameters=FUSED)
    output = tmp_path / "adapter.gguf"
    export_gguf(str(adapter), str(base), str(output))
    found = _tensors(output)
    inner = 128 if kind in ("mixtral", "olmoe") else 48
    for piece, rows, columns in (("gate", inner, 64), ("up", inner, 64), ("down", 64, inner)):
        assert found[f"blk.0.ffn_{piece}_exps.weight.lora_a"].shape == (4, 4, columns)
        assert found[f"blk.0.ffn_{piece}_exps.weight.lora_b"].shape == (4, rows, 4)
    assert ("blk.0.ffn_down_shexp.weight.lora_a" if kind == "qwen2_moe" else "blk.0.attn_output.weight.lora_a") in found
    # Compare with what merging adds to each expert's matrix: gate precedes up, and A and B have PEFT's layout.
    merged = tmp_path / "merged"
    merge(str(base), str(adapter), str(merged))
    before, after = (load_file(each / "model.safetensors") for each in (base, merged))
    names = {"gate": "w1", "up": "w3", "down": "w2"} if kind == "mixtral" else {}
    inside = "block_sparse_moe" if kind == "mixtral" else "mlp"
    for piece in ("gate", "up", "down"):
        a, b = (found[f"blk.0.ffn_{piece}_exps.weight.lora_{letter}"] for letter in "ab")
        for expert in range(4):
            file = f"model.layers.0.{inside}.experts.{expert}.{names.get(piece, f'{piece}_proj')}.weight"
            added = (after[file] - before[file]).numpy()
            assert np.abs(added).max() > 0.01
            assert np.allclose(8 / 4 * b[expert] @ a[expert], added, atol=1e-5)


def test_permuted_rows_rotate_as_llama_cpp_rotates_them() -> None:
    """Scores of q and k under Hugging Face's rotary embedding equal those of permuted q and k under llama.cpp's."""
    generator = torch.Generator().manual_seed(0)
    heads, size = 3, 8
    q, k = torch.randn(2, heads * size, generator=generator)
    angles = 5.0 * torch.rand(size // 2, generator=generator)

    def halves(vector: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        first, second = vector.view(heads, 2, size // 2).unbind(1)
        return torch.cat([first * by.cos() - second * by.sin(), second * by.cos() + first * by.sin()], -1)

    def neighbours(vector: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        even, odd = vector.view(heads, size // 2, 2).unbind(-1)
        return torch.stack([even * by.cos() - odd * by.sin(), odd * by.cos() + even * by.sin()], -1).flatten(1)

    wanted = (halves(q, 3 * angles) * halves(k, angles)).sum(-1)
    permuted = [permute(each[:, None], heads)[:, 0] for each in (q, k)]
    found = (neighbours(permuted[0], 3 * angles) * neighbours(permuted[1], angles)).sum(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose((neighbours(q, 3 * angles) * neighbours(k, angles)).sum(-1), wanted, atol=1e-2)


@pytest.mark.parametrize(("outtype", "step"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 254 + 2**-11)])
def test_smaller_types(outtype: Any, step: float, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3")
    adapter = write_adapter(tmp_path / "adapter", base, rank=32, target_modules=["down_proj"])
    for name in ("f32", outtype):
        export_gguf(str(adapter), str(base), str(tmp_path / name), name)
    exact, found = _tensors(tmp_path / "f32"), _tensors(tmp_path / outtype)
    types = {each.tensor_type.name.lower() for each in gguf.GGUFReader(tmp_path / outtype).tensors}
    assert types == {outtype}
    for name, values in exact.items():
        blocks = np.abs(values.reshape(-1, 32 if outtype == "q8_0" else 1)).max(-1, keepdims=True)
        error = np.abs(found[name] - values).reshape(blocks.shape[0], -1)
        assert error.max() > 0
        assert (error <= blocks * step * 1.01 + 1e-7).all()


def test_q8_0_of_a_rank_that_fills_no_block_is_f16(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["down_proj"])
    export_gguf(str(adapter), str(base), str(tmp_path / "out"), "q8_0")
    types = {each.name[-6:]: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "out").tensors}
    assert types == {"lora_a": "Q8_0", "lora_b": "F16"}


def test_different_scalings_end_in_one_alpha(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3")
    options = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True}
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj", "o_proj"], **options)
    export_gguf(str(adapter), str(base), str(tmp_path / "out"))
    found, lora = _tensors(tmp_path / "out"), load_file(adapter / "adapter_model.safetensors")
    alpha = _field(tmp_path / "out", "adapter.lora.alpha")
    for module, tensor, scaling in (
        ("q", "attn_q", 8 / 4**0.5),
        ("v", "attn_v", 8 / 2**0.5),
        ("o", "attn_output", 1.5),
    ):
        a, b = (found[f"blk.1.{tensor}.weight.lora_{letter}"] for letter in "ab")
        key = f"base_model.model.model.layers.1.self_attn.{module}_proj.lora_"
        wanted = scaling * lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
        assert np.allclose(alpha / a.shape[0] * b @ a, wanted.numpy(), atol=1e-5)


def test_the_embedding_is_looked_up_by_token(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "lm_head"])
    export_gguf(str(adapter), str(base), str(tmp_path / "out"))
    found = _tensors(tmp_path / "out")
    assert {name: each.shape for name, each in found.items()} == {
        "token_embd.weight.lora_a": (128, 4),
        "token_embd.weight.lora_b": (64, 4),
        "output.weight.lora_a": (4, 64),
        "output.weight.lora_b": (128, 4),
    }


def test_control_adapters_in_one_step(tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", "cohere"), write_control_adapter(tmp_path / "control")
    export_gguf(str(control), str(base), str(tmp_path / "one"), inverse=True)
    control_to_lora(str(base), str(control), str(tmp_path / "lora"), inverse=True)
    export_gguf(str(tmp_path / "lora"), str(base), str(tmp_path / "two"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(("kind", "layers"), [("phi", "model.layers"), ("gpt2", "transformer.h")])
def test_a_control_adapter_on_layers_with_biases_has_a_way_that_works(kind: str, layers: str, tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", kind), write_control_adapter(tmp_path / "control", layers, (0, 1))
    with pytest.raises(ConfigurationError, match="becomes a LoRA with biases, which") as raised:
        export_gguf(str(control), str(base), str(tmp_path / "out.gguf"))
    assert str(raised.value).startswith(f"{control}: on {base}")
    assert not (tmp_path / "out.gguf").exists()
    # What the message tells the user to do.
    assert "(pipelite control-to-lora), merge it (pipelite merge)" in str(raised.value)
    control_to_lora(str(base), str(control), str(tmp_path / "lora"))
    merge(str(base), str(tmp_path / "lora"), str(tmp_path / "merged"))
    merged = logits(load(tmp_path / "merged"))
    # On phi, whose attention and MLP are parallel, the LoRA is exact.
    wanted = with_control(base, control, 1) if kind == "phi" else with_adapter(base, tmp_path / "lora")
    assert (wanted - logits(load(base))).abs().max() > 0.1
    assert torch.allclose(merged, wanted, atol=1e-5)


def test_no_message_names_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, control = write_base(tmp_path / "base", "cohere"), write_control_adapter(tmp_path / "control")

    def broken(self: Any) -> Any:
        raise ConfigurationError(f"{self.directory} is broken.")

    monkeypatch.setattr("lightning_pipelite.export.gguf.LoRAOfBase.factors", broken)
    with pytest.raises(ConfigurationError, match=f"^the LoRA that control-to-lora makes of {control} is broken"):
        export_gguf(str(control), str(base), str(tmp_path / "out.gguf"))


def test_what_llama_cpp_cannot_do_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    dora = write_adapter(tmp_path / "dora", base, target_modules=["q_proj"], use_dora=True)
    lora = write_adapter(tmp_path / "lora", base, target_modules=["q_proj"])
    output = tmp_path / "out.gguf"
    with pytest.raises(ConfigurationError, match="is a DoRA, which cannot be expressed as factors"):
        export_gguf(str(dora), str(base), str(output))
    with pytest.raises(ConfigurationError, match="is not a Control Adapter"):
        export_gguf(str(lora), str(base), str(output), inverse=True)
    output.write_text("mine")
    with pytest.raises(ConfigurationError, match="exists; choose a new file"):
        export_gguf(str(lora), str(base), str(output))
    other = write_base(tmp_path / "other", "gpt_oss")
    adapter = write_adapter(tmp_path / "adapter", other, target_modules=["q_proj"])
    with pytest.raises(ConfigurationError, match=r"type gpt_oss cannot be exported to llama\.cpp"):
        export_gguf(str(adapter), str(other), str(tmp_path / "other.gguf"))
    assert output.read_text() == "mine"
    assert not list(tmp_path.glob(".*partial"))
