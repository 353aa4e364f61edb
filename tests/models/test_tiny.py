"""A tiny model has the modules and parameters of the real one, and lacks those that its configuration disables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_pipelite.models.small_sizes import small_sizes
from lightning_pipelite.models.tiny import tiny_config
from published_bases import PUBLISHED
from tiny_families import kinds

torch.set_num_threads(1)


def config_of(facts: dict[str, Any]) -> PretrainedConfig:
    return CONFIG_MAPPING[facts["model_type"]](**{key: value for key, value in facts.items() if key != "model_type"})


@pytest.mark.parametrize("name", list(PUBLISHED)[::3])  # benchmarks/coverage.py tries all
def test_published_configurations_keep_their_kinds(name: str) -> None:
    config = config_of(PUBLISHED[name])
    assert kinds(tiny_config(config)) == kinds(config)


# Model types with unusual defaults; benchmarks/coverage.py tries all types of the mapping.
@pytest.mark.parametrize(
    "model_type",
    ["dots3_note_text", "electra", "gemma3n_text", "granitemoe_swa", "granitemoeshared", "opt", "recurrent_gemma"],
)
def test_defaults_keep_their_kinds(model_type: str) -> None:
    assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    config = CONFIG_MAPPING[model_type]()
    assert kinds(tiny_config(config)) == kinds(config)


@pytest.mark.parametrize("nothing", [0, None])
def test_nothing_stays_nothing(nothing: int | None) -> None:
    facts = {**PUBLISHED["Granite 4.0 H Micro"], "sliding_window": nothing, "head_dim": nothing, "q_lora_rank": nothing}
    small = tiny_config(config_of(facts))
    assert (small.sliding_window, small.head_dim, small.q_lora_rank) == (nothing,) * 3
    assert small.num_local_experts == 0


def test_what_is_equal_stays_equal_and_what_differs_differs() -> None:
    mixed = {"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512}
    assert small_sizes(config_of(mixed)) | {"vocab_size": 0} != small_sizes(config_of({**mixed, "hidden_size": 512}))
    for name in ("DeepSeek-V3", "Qwen3 8B", "OLMo 3 7B"):
        small = tiny_config(config_of(PUBLISHED[name])).to_dict()
        real = config_of(PUBLISHED[name]).to_dict()
        assert (small["num_attention_heads"] == small["num_key_value_heads"]) == (
            real["num_attention_heads"] == real["num_key_value_heads"]
        )
    heads = tiny_config(config_of(PUBLISHED["DeepSeek-V3"]))
    assert heads.qk_head_dim == heads.qk_nope_head_dim + heads.qk_rope_head_dim
    assert heads.v_head_dim == heads.qk_nope_head_dim != heads.qk_head_dim  # as in the real one


def test_what_single_layers_have_otherwise_they_have_otherwise() -> None:
    small = tiny_config(config_of(PUBLISHED["Gemma 4 31B"]))
    sizes = [(layer.head_dim, layer.num_key_value_heads) for layer in map(small.per_layer_config.__getitem__, (4, 5))]
    assert sizes[0][0] < sizes[1][0]
    assert sizes[0][1] > sizes[1][1]
