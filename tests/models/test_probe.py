"""What trials find out about real configurations from their config.json alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3NextConfig,
    RobertaConfig,
)

from lightning_pipelite.adapters import ControlAdapter, Full
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, MetaModel
from lightning_pipelite.models.probe import Probe, _equal_exactly
from lightning_pipelite.models.tiny import tiny_config
from lightning_pipelite.strategy.partition import partition
from published_bases import PUBLISHED

# Sizes, depths and rotary scaling as published; everything else is the class's default.
REAL: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": [128001, 128008],
        "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "phi3": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "sliding_window": 262144, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000,
        "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.1] * 48},
    },
    "gemma3_text": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
    },
    "qwen3_moe": {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
        "decoder_sparse_step": 1, "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 256, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "q_lora_rank": 1536,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    },
    "gpt_oss": {
        "hidden_size": 2880, "num_hidden_layers": 24, "num_local_experts": 32, "sliding_window": 128,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
    },
    "cohere": {"hidden_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 64, "logit_scale": 0.0625},
    "gemma2": {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8},
    "glm4": {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2},
    "olmo3": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "sliding_window": 4096},
    "mixtral": {"num_hidden_layers": 32, "num_local_experts": 8, "sliding_window": None},
    "opt": {"hidden_size": 1024, "word_embed_proj_dim": 512, "num_hidden_layers": 24, "num_attention_heads": 16,
            "ffn_dim": 4096, "do_layer_norm_before": False},  # layers differ in width from embedding and head
    "qwen2": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("model_type", list(REAL))
def test_real_configurations_can_be_cut_everywhere_and_packed(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **REAL[model_type]}))
    meta_model = MetaModel(tmp_path)
    assert meta_model.groups == list(range(REAL[model_type]["num_hidden_layers"] + 1))
    assert meta_model.isolates_documents
    assert meta_model.takes_positions
    embedding = meta_model.model.get_submodule(meta_model.embedding_name)
    assert embedding.embedding_dim == REAL[model_type].get("word_embed_proj_dim", meta_model.model.config.hidden_size)


def meta_model_of(tmp_path: Path, config: Any) -> MetaModel:
    config.save_pretrained(tmp_path)
    return MetaModel(tmp_path)


SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}


def test_recurrent_layers_run_by_document(tmp_path: Path) -> None:
    mamba = meta_model_of(tmp_path / "mamba", MambaConfig(hidden_size=64, num_hidden_layers=2))
    assert mamba.isolates_documents
    assert mamba.by_document == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    config = Qwen3NextConfig(**SMALL, num_hidden_layers=4, num_attention_heads=4, num_experts=4)
    hybrid = meta_model_of(tmp_path / "next", config)
    assert hybrid.isolates_documents
    assert hybrid.by_document == [f"model.layers.{number}.linear_attn" for number in range(3)]
    attends = meta_model_of(tmp_path / "oss", GptOssConfig(num_hidden_layers=2))
    assert attends.isolates_documents
    assert attends.by_document == []


def test_positions_that_do_not_start_at_zero_are_left_to_the_model(tmp_path: Path) -> None:
    config = RobertaConfig(is_decoder=True, num_hidden_layers=2)
    meta_model = meta_model_of(tmp_path, config)
    assert not meta_model.takes_positions
    assert not meta_model.isolates_documents


def test_layers_that_share_state_stay_together(tmp_path: Path) -> None:
    sizes = {**SMALL, "num_hidden_layers": 4, "num_attention_heads": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3nTextConfig(**sizes, num_kv_shared_layers=1, layer_types=kinds)
    assert meta_model_of(tmp_path / "one", config).groups == [0, 1, 4]  # the last uses the second's keys and values
    config = Gemma3nTextConfig(**sizes, num_kv_shared_layers=2, layer_types=kinds)
    meta_model = meta_model_of(tmp_path, config)
    assert meta_model.groups == [0, 4]
    assert "each other's state" in str(meta_model.one_stage_only)
    AutoModelForCausalLM.from_config(tiny_config(config)).save_pretrained(tmp_path)
    layers = CausalLMLayers(tmp_path, adapter=Full())
    assert partition(layers, 1) == [0, 1]
    with pytest.raises(ConfigurationError, match=r"pipeline_stages=2, .*one stage only because all its decoder layers"):
        partition(layers, 2)
    with pytest.raises(ConfigurationError, match=r"one stage only because .*set stages to 1"):
        check_model(tmp_path)
    with pytest.raises(ConfigurationError, match=r"one stage only because .*; choose LoRA\."):
        CausalLMLayers(tmp_path, adapter=ControlAdapter(rank=2))


@pytest.mark.parametrize("asked", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_attention_that_config_json_asks_for_is_known_or_refused(tmp_path: Path, asked: str) -> None:
    LlamaConfig(**SMALL, num_hidden_layers=2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": asked}))
    with pytest.raises(ConfigurationError, match=f"sets attn_implementation to {asked}.*set attn_imp"):
        MetaModel(tmp_path)
    for remedy in ("sdpa", "eager"):
        assert MetaModel(tmp_path, attn_implementation=remedy).config._attn_implementation == remedy
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "eager"}))
    assert MetaModel(tmp_path).config._attn_implementation == "eager"


def named(probe: Probe) -> dict[str, torch.Tensor]:
    return {**dict(probe.model.named_parameters()), **dict(probe.model.named_buffers())}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_hidden_layers=2),
        LlamaConfig(**SMALL, num_hidden_layers=2, tie_word_embeddings=True),
        GptOssConfig(num_hidden_layers=2),
        MambaConfig(hidden_size=64, num_hidden_layers=2),
    ],
    ids=["llama", "tied", "experts", "recurrent"],
)
def test_a_probe_by_other_code_has_the_weights_of_the_known_one(config: Any) -> None:
    known = Probe(config)
    other = Probe(config, partial(AutoModelForCausalLM.from_config, attn_implementation="eager"), known)
    assert other.model.config._attn_implementation == "eager"
    assert named(other).keys() == named(known).keys()
    for name, tensor in named(known).items():
        assert torch.equal(named(other)[name], tensor), name
        assert named(other)[name].data_ptr() != tensor.data_ptr()
    tied = [
        probe.model.get_output_embeddings().weight is probe.model.get_input_embeddings().weight
        for probe in (known, other)
    ]
    assert tied == [config.tie_word_embeddings] * 2


def test_a_probe_with_other_names_has_the_weights_of_the_seed() -> None:
    config = LlamaConfig(**SMALL, num_hidden_layers=2)

    def build(*args: Any, **kwargs: Any) -> Any:
        model = AutoModelForCausalLM.from_config(*args, **kwargs)
        model.lm_head.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
        return model

    known = Probe(config)
    other = named(Probe(config, build, known))
    assert bool(other.pop("lm_head.more"))  # noise was added to it, too
    assert all(torch.equal(other[name], tensor) for name, tensor in named(known).items())


def test_strong_weights_leave_no_trace_in_what_is_remembered() -> None:
    config = LlamaConfig(**SMALL, num_hidden_layers=2)
    probe, fresh = Probe(config), Probe(config)
    assert probe.layers_attend_as(fresh, ["model.layers.0", "model.layers.1"])
    assert probe.isolates_documents()
    assert probe.attends_as(Probe(config))  # which has not tried strong weights


def test_rounding_of_many_layers_is_no_leak(tmp_path: Path) -> None:
    """With all 35 layers of Gemma 3n, packing changes the logits by about 1e-4 in float32."""
    facts = {name: value for name, value in PUBLISHED["Gemma 3n E4B"].items() if name != "model_type"}
    Gemma3nTextConfig(**facts).save_pretrained(tmp_path)
    meta_model = MetaModel(tmp_path)
    assert meta_model.isolates_documents
    assert meta_model.by_document == []
    assert {p.dtype for p in meta_model._probe.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("leaks", [False, True])
def test_what_is_close_is_asked_again_in_double(leaks: bool) -> None:
    class Asked:
        dtype = torch.float32

        def cast(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    probe: Any = Asked()
    logits = torch.tensor([1.0, -2.0])
    types = []

    def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        types.append(probe.dtype)
        return [(logits, logits + (1e-3 if leaks or probe.dtype == torch.float32 else 1e-12))]

    assert _equal_exactly(pairs, probe) != leaks
    assert types == [torch.float32, torch.float64]
    assert probe.dtype == torch.float32
    assert not _equal_exactly(lambda: [(logits, logits + 1)])
