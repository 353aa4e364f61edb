"""With length-dependent rotary frequencies, each document computes what it does alone in a freshly loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, MetaModel
from lightning_pipelite.models.rope import document_lengths, is_static
from tiny_models import CPU, build, run_stages

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 4 * i for i in range(8)]}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
CONFIGS: dict[str, PretrainedConfig] = {
    "dynamic": LlamaConfig(**SIZES, max_position_embeddings=8, rope_scaling=DYNAMIC),
    "longrope": Phi3Config(
        **SIZES,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        rope_scaling={"rope_type": "longrope", **LONG},
    ),
    "longrope, a share of each head": Phi3Config(
        **SIZES,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": [1.0] * 6,
            "long_factor": [9.0] * 6,
            "partial_rotary_factor": 0.75,
        },
    ),
    "longrope, own scales": PhimoeConfig(
        **SIZES,
        num_local_experts=2,
        max_position_embeddings=64,
        rope_scaling={
            "rope_type": "longrope",
            **LONG,
            "short_mscale": 1.1,
            "long_mscale": 1.5,
            "original_max_position_embeddings": 8,
        },
    ),
    "dynamic, of full attention alone": Gemma3TextConfig(
        **{**SIZES, "head_dim": 16, "max_position_embeddings": 8},
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": DYNAMIC,
        },
    ),
}
# Documents shorter and longer than the 8 positions that the models are made for, in both orders.
LENGTHS = ([20, 3, 9, 8], [5, 12, 20, 3])


def write(directory: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def fresh(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def tokens() -> Tensor:
    return torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def stages_of(layers: CausalLMLayers, cuts: list[int]) -> list[Any]:
    return [stage.eval() for stage in build(layers, cuts)]


def layers_of(directory: Path, **options: Any) -> CausalLMLayers:
    return CausalLMLayers(directory, dtype=torch.float32, adapter=LoRA(rank=2), **options)


@pytest.mark.parametrize("kind", list(CONFIGS))
@torch.no_grad()
def test_each_packed_document_is_as_alone_whatever_ran_before(tmp_path: Path, kind: str) -> None:
    directory = write(tmp_path, CONFIGS[kind])
    meta_model = MetaModel(directory)
    assert not is_static(meta_model.model)
    assert meta_model.isolates_documents
    position_ids = torch.stack([positions(row) for row in LENGTHS])
    whole = fresh(directory)
    undone = whole(input_ids=tokens(), position_ids=position_ids, use_cache=False).logits
    for cuts in ([0, 2], [0, 1, 2]):
        stages = stages_of(layers_of(directory), cuts)
        run_stages(stages, tokens()[:1], torch.arange(40)[None])  # a longer document, which must leave no state behind
        for _ in range(2):
            packed = run_stages(stages, tokens(), position_ids)
            largest = 0.0
            for row, lengths in enumerate(LENGTHS):
                for ids, logits, other in zip(
                    tokens()[row].split(lengths), packed[row].split(lengths), undone[row].split(lengths), strict=True
                ):
                    alone = fresh(directory)(input_ids=ids[None], use_cache=False).logits[0]
                    torch.testing.assert_close(logits, alone, rtol=0, atol=2e-5)
                    largest = max(largest, float((other - alone).abs().max()))
            assert largest > 1e-2, "the lengths do not matter to this model"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_gradients_do_not_depend_on_the_micro_batches_before(tmp_path: Path, kind: str) -> None:
    layers = CausalLMLayers(write(tmp_path, CONFIGS[kind]), dtype=torch.float32, adapter=Full())
    row = torch.arange(7)[None]  # shorter than the length that the model is made for

    def gradient(stages: list[Any]) -> Tensor:
        run_stages(stages, tokens()[:1, :7], row).square().mean().backward()
        return next(stages[0].parameters()).grad

    first, second = build(layers, [0, 2]), build(layers, [0, 2])
    run_stages(second, tokens(), torch.arange(40).expand(2, -1))
    torch.testing.assert_close(gradient(first), gradient(second), rtol=0, atol=0)


@torch.no_grad()
def test_one_document_a_sequence_leaves_nothing_behind_either(tmp_path: Path) -> None:
    directory = write(tmp_path, CONFIGS["dynamic"])
    (stage,) = stages_of(layers_of(directory, packed=False), [0, 2])
    for length in (9, 30, 20, 12, 8, 30):
        ids = tokens()[:1, :length]
        alone = fresh(directory)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(stage((ids, torch.arange(length)[None])), alone, rtol=0, atol=2e-5)


def test_static_types_are_left_alone(tmp_path: Path) -> None:
    for number, scaling in enumerate(
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "default"})
    ):
        config = LlamaConfig(**SIZES, max_position_embeddings=8, rope_scaling=scaling)
        directory = write(tmp_path / str(number), config)
        assert is_static(MetaModel(directory).model)
        model = layers_of(directory).build_stage(0, 2, CPU).causal_lm
        assert type(model.model.rotary_emb) is LlamaRotaryEmbedding


def test_lengths_of_documents() -> None:
    rows = torch.stack([positions([1, 3, 2]), positions([6])])
    assert document_lengths(rows).tolist() == [[1, 3, 3, 3, 2, 2], [6] * 6]
    assert document_lengths(rows.expand(3, -1, -1)).shape == (3, 2, 6)


OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Rotary(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.limit = config.max_position_embeddings
        self.size = config.head_dim
        self.longest = 0

    def forward(self, x, position_ids):
        longest = int(position_ids.max()) + 1
        {update}
        base = 100.0 * max(1.0, 4 * longest / self.limit - 3)
        frequencies = base ** (-torch.arange(0, self.size, 2) / self.size)
        angles = position_ids[..., None].float() * frequencies
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = Rotary(config)
"""


def write_own(directory: Path, update: str) -> Path:
    write(directory, LlamaConfig(**SIZES, max_position_embeddings=8))
    (directory / "own.py").write_text(OWN.format(update=update))
    path = directory / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": own}))
    return directory


def test_code_of_the_models_own_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    follows = write_own(tmp_path / "follows", "pass")
    assert not MetaModel(follows, trust_remote_code=True).isolates_documents
    with pytest.raises(ConfigurationError, match="set packed to false"):
        layers_of(follows, trust_remote_code=True)
    layers_of(follows, trust_remote_code=True, packed=False)
    remembers = write_own(tmp_path / "remembers", "longest = self.longest = max(longest, self.longest)")
    with pytest.raises(ConfigurationError, match="after a long document"):
        layers_of(remembers, trust_remote_code=True, packed=False)
    static = write_own(tmp_path / "static", "longest = self.limit")
    assert MetaModel(static, trust_remote_code=True).isolates_documents
