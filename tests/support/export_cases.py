"""Tiny bases of many kinds, random adapters of many kinds on them, and PEFT's results as the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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

from tiny_models import CONFIGS, SIZES

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
# The adapters: PEFT's options and, for some, the base to try them on.
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
    "modules whose names end so": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}
INPUT_IDS = torch.tensor([[5, 17, 99, 3, 64, 21, 8, 90], [1, 2, 3, 4, 5, 6, 7, 8]])


def write_base(directory: Path, kind: str, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model without any weights at trivial initial values."""
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
    """Return the logits of the base with the unmerged adapter, through PEFT."""
    return logits(PeftModel.from_pretrained(load(base), adapter).eval())


def write_control_adapter(
    directory: Path,
    layers: str = "model.layers",
    numbers: tuple[int, ...] = (0, 1, 2, 3),
    rank: int = 4,
    size: float = 0.3,
) -> Path:
    """Save a random Control Adapter of width 64 with orthonormal directions."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for number in numbers:
        directions = torch.linalg.qr(torch.randn(64, rank, generator=generator))[0]
        tensors[f"base_model.model.{layers}.{number}.control_Q"] = directions.contiguous()
        tensors[f"base_model.model.{layers}.{number}.control_S"] = size * torch.randn(rank, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "CONTROL_ADAPTER", "task_type": "CAUSAL_LM", "r": rank}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@torch.no_grad()
def with_control(base: Path, adapter: Path, sign: int) -> Tensor:
    """Return the logits of the base with a Control Adapter, implemented independently from its definition."""
    model = load(base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("_Q")]:
        directions = tensors[key]
        matrix = torch.eye(64) + directions @ torch.diag(torch.exp(sign * tensors[key[:-1] + "S"]) - 1) @ directions.T

        def hook(_layer: Any, args: Any, kwargs: Any, returned: Any, matrix: Tensor = matrix) -> Any:
            entered = args[0] if args else kwargs["hidden_states"]
            output = returned[0] if isinstance(returned, tuple) else returned
            output = entered + (output - entered) @ matrix.T
            return (output, *returned[1:]) if isinstance(returned, tuple) else output

        layer = key.removeprefix("base_model.model.").removesuffix(".control_Q")
        model.get_submodule(layer).register_forward_hook(hook, with_kwargs=True)
    return logits(model)
