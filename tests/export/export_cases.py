"""Tiny bases of many kinds, random adapters of many kinds on them, and PEFT's own result to hold ours against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models.tiny_models import CONFIGS, SIZES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Starcoder2Config,
)

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BASES: dict[str, PretrainedConfig] = {
    **CONFIGS,
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        mlp_only_layers=[1],
    ),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS, pad_token_id=0),
    "cohere": CohereConfig(**SIZES, pad_token_id=0),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, pad_token_id=0),
    "phi": PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "starcoder2": Starcoder2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "gpt2": GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What adapters there are: PEFT's options and, for some, the base to try them on.
ADAPTERS: dict[str, dict[str, Any]] = {
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"v_proj": 7},
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
INPUT_IDS = torch.tensor([[5, 17, 99, 3, 64, 21, 8, 90], [1, 2, 3, 4, 5, 6, 7, 8]])


def write_base(directory: Path, kind: str, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model none of whose weights are at trivial initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[kind], dtype=dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def write_adapter(directory: Path, base: Path, seed: int = 1, rank: int = 4, **options: Any) -> Path:
    """Save a random adapter that PEFT made."""
    torch.manual_seed(seed)
    options = {"lora_alpha": 8, **options}
    model = get_peft_model(load(base), LoraConfig(r=rank, task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=INPUT_IDS, use_cache=False).logits


def with_adapter(base: Path, adapter: Path) -> Tensor:
    """The logits of the base with the adapter beside it, through PEFT."""
    return logits(PeftModel.from_pretrained(load(base), adapter).eval())
