from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    MixtralConfig,
    RobertaConfig,
    T5Config,
)

from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from own_code import write_own
from tiny_models import CPU, POSITIONS, SIZES, build, micro_batches, run_stages, write_model

CODES = torch.ones(8)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "llama", max_shard_size="100KB")


def refuses(model_dir: Path, *words: str, **options: object) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        CausalLMLayers(model_dir, **{"adapter": LoRA(4), **options})
    for word in words:
        assert word in str(refusal.value)


def shard(model_dir: Path) -> Path:
    return sorted(model_dir.glob("model-*.safetensors"))[1]


def test_missing_directory(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere")


def test_missing_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    refuses(model_dir, "config.json")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "no_such_type"}',
        '{"model_type": "llama", "hidden_size": "a"}',
        '{"model_type": "llama", "pad_token_id": 99999}',
    ],
)
def test_damaged_config(model_dir: Path, text: str) -> None:
    (model_dir / "config.json").write_text(text)
    refuses(model_dir, "config.json")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_shard(model_dir: Path, kept: int) -> None:
    path = shard(model_dir)
    path.write_bytes(path.read_bytes()[:kept])
    refuses(model_dir, path.name)


def test_shard_with_garbage_for_a_header(model_dir: Path) -> None:
    shard(model_dir).write_bytes((16).to_bytes(8, "little") + b"[1, 2, 3]" + b" " * 7)
    refuses(model_dir, shard(model_dir).name)


def test_missing_shard(model_dir: Path) -> None:
    path = shard(model_dir)
    path.unlink()
    refuses(model_dir, path.name)


def test_index_that_names_a_missing_weight(model_dir: Path) -> None:
    path = model_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.weight"] = shard(model_dir).name
    path.write_text(json.dumps(index))
    refuses(model_dir, "model.layers.9.mlp.weight", shard(model_dir).name)


def test_damaged_index(model_dir: Path) -> None:
    path = model_dir / "model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        path.write_text(text)
        refuses(model_dir, path.name)


def test_no_weights_and_pickled_weights(model_dir: Path) -> None:
    for path in model_dir.glob("model*"):
        path.unlink()
    refuses(model_dir, "model.safetensors")
    (model_dir / "pytorch_model.bin").touch()
    refuses(model_dir, ".bin", "allow_pickled_weights")


def test_pickled_weights_if_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(), allow_pickled_weights=True)
    stage = layers.build_stage(1, 3, CPU)
    held = dict(stage.causal_lm.named_parameters())
    assert held
    torch.testing.assert_close(held, {name: state[name] for name in held}, rtol=0, atol=0)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x-1.bin"}}))
    (tmp_path / "x-2.bin").touch()
    refuses(tmp_path, "x-1.bin", allow_pickled_weights=True)


def test_own_code_if_trusted(tmp_path: Path) -> None:
    write_own(tmp_path)
    refuses(tmp_path, "config.json", "trust_remote_code")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(), trust_remote_code=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, trust_remote_code=True)
    (input_ids, _), _ = micro_batches()
    expected = whole(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
    for cuts in ([0, 4], [0, 1, 4]):
        torch.testing.assert_close(run_stages(build(layers, cuts), input_ids, POSITIONS), expected)


def test_adapter_beside_the_model(model_dir: Path) -> None:
    (model_dir / "adapter_config.json").write_text("{}")
    refuses(model_dir, "adapter_config.json")


def change(model_dir: Path, **changed: torch.Tensor | None) -> None:
    """Set weights in a model's only file, or remove those that are None."""
    weights = load_file(model_dir / "model.safetensors")
    kept = {n: w for n, w in {**weights, **changed}.items() if w is not None}
    save_file(kept, model_dir / "model.safetensors", metadata={"format": "pt"})


def set_config(model_dir: Path, **values: object) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_weight_that_the_files_lack_or_hold_in_another_shape(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    name = "model.layers.2.mlp.up_proj.weight"
    change(tmp_path, **{name: torch.zeros(3, 5)})
    refuses(tmp_path, name, "[3, 5]", "[128, 64]")
    change(tmp_path, **{name: None})
    refuses(tmp_path, name, "lacks")


def test_configuration_with_other_sizes_than_the_weights(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    set_config(tmp_path, intermediate_size=192)
    refuses(tmp_path, "mlp.down_proj.weight", "[64, 128]", "[64, 192]")


def test_shard_that_another_model_has_under_the_same_name(model_dir: Path) -> None:
    shard(model_dir).write_bytes(sorted(model_dir.glob("model-*.safetensors"))[2].read_bytes())
    refuses(model_dir, "does not hold", shard(model_dir).name)


@pytest.mark.parametrize("layers", [3, 5])
def test_configuration_with_another_number_of_layers_than_the_weights(tmp_path: Path, layers: int) -> None:
    write_model(tmp_path, "llama")
    set_config(tmp_path, num_hidden_layers=layers)
    refuses(tmp_path, "model.layers.4." if layers == 5 else "model.layers.3.")


def test_weights_that_the_configurations_model_has_no_place_for(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    set_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    refuses(tmp_path, "self_attn.k_norm.weight", "config.json")
    change(tmp_path, **{f"model.layers.{i}.self_attn.{n}_norm.weight": None for i in range(4) for n in "qk"})
    CausalLMLayers(tmp_path, adapter=Full())
    change(tmp_path, **{"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})
    refuses(tmp_path, "q_proj.bias", "config.json")
    change(tmp_path, **{"model.layers.1.self_attn.q_proj.bias": None, "model.layers.0.rotary_emb.inv_freq": CODES})
    CausalLMLayers(tmp_path, adapter=Full())  # a buffer, which is not trained


def test_layers_that_predict_further_tokens_are_left_out_and_a_routers_bias_is_not(tmp_path: Path) -> None:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    config = DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "head_dim": 8},
        **sizes,
        **experts,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    change(tmp_path, **{"model.layers.4.eh_proj.weight": torch.zeros(64, 128)})
    set_config(tmp_path, num_nextn_predict_layers=0)
    refuses(tmp_path, "model.layers.4.eh_proj.weight", adapter=Full())
    set_config(tmp_path, num_nextn_predict_layers=1)
    CausalLMLayers(tmp_path, adapter=Full())
    change(tmp_path, **{"model.layers.3.mlp.gate.e_score_correction_bias": None})
    refuses(tmp_path, "model.layers.3.mlp.gate.e_score_correction_bias", adapter=Full())


def test_weights_stored_in_a_type_that_needs_scales(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype, word in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        change(tmp_path, **{name: torch.zeros(128, 64).to(dtype)})
        refuses(tmp_path, name, word)


@pytest.mark.parametrize("lost", [("w1",), ("w1", "w3"), ("w2",), ("w1", "w2", "w3")])
def test_expert_that_the_files_lack(tmp_path: Path, lost: tuple[str, ...]) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=4)).save_pretrained(
        tmp_path
    )
    change(tmp_path, **{f"model.layers.1.block_sparse_moe.experts.2.{name}.weight": None for name in lost})
    refuses(tmp_path, "model.layers.1.mlp.experts.")


def test_missing_head_is_not_made_up(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    change(tmp_path, **{"lm_head.weight": None})
    refuses(tmp_path, "lm_head.weight")


def test_files_that_change_after_the_check_are_told_as_they_are_loaded(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full())
    name = "model.layers.2.mlp.up_proj.weight"
    for value in (torch.zeros(3, 5), None):
        change(tmp_path, **{name: value})
        layers.build_stage(0, 2, CPU)  # this stage does not hold the weight
        with pytest.raises(ConfigurationError, match=name):
            layers.build_stage(2, 4, CPU)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (BertConfig(num_hidden_layers=2), "later tokens"),
        (T5Config(), "causal"),
        (RobertaConfig(num_hidden_layers=2, is_decoder=True), "packed"),  # its positions do not begin at 0
    ],
    ids=["bert", "t5", "roberta"],
)
def test_models_that_cannot_be_split(tmp_path: Path, config: object, word: str) -> None:
    config.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    refuses(tmp_path, word)


def test_quantised_checkpoint(model_dir: Path) -> None:
    path = model_dir / "config.json"
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantization))
    refuses(model_dir, "quantization_config")


def test_wrong_options(model_dir: Path) -> None:
    refuses(model_dir, "activation_memory", activation_memory="some")
    refuses(model_dir, "q_prjo", "q_proj", adapter=LoRA(4, target_modules=["q_prjo"]))
    refuses(model_dir, "7", adapter=LoRA(4, layers_to_transform="2:7"))
    refuses(model_dir, "load_in_4bit", adapter=Full(), load_in_4bit=True)
    with pytest.raises(ValueError, match="range"):
        CausalLMLayers(model_dir, adapter=LoRA(4)).build_stage(2, 5, CPU)
