"""What step.py trains: its jobs, with what each must reach, and the sequences that they are trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pipelite.adapters import Adapter, ControlAdapter, Full, LoRA
from random_model import SHAPES, random_sequences

MICRO_BATCHES, RANK = 4, 16
PEAK_RATE = 989e12
TRAINER, BARE, REFERENCE, FLOAT32, UNSLOTH = "Trainer", "bare loop", "transformers + PEFT", "float32", "Unsloth"


@dataclass(frozen=True)
class Job:
    """What is trained, and what it must reach on an H100.

    Attributes:
        adapter: A name of :func:`make_adapter`.
        memory: The option ``activation_memory``.
        in_4bit: The option ``load_in_4bit``.
        in_fp8: The option ``load_in_fp8``.
        transpose_cache: The option ``fp8_transpose_cache``.
        tokens_per_s: Lower limit.
        gib: Upper limit.
        loops: The loops that train it.
        shape: The shape that it is trained with, if not the given one.
        limited: The shape that the limits apply to.
        saving: Whether the scales of 4-bit weights are quantised too, and the optimizer's state is on the host.
    """

    adapter: str
    memory: str
    in_4bit: bool = False
    tokens_per_s: float = 0.0
    gib: float = math.inf
    loops: tuple[str, ...] = (TRAINER, BARE)
    shape: str = ""
    limited: str = "8b"
    in_fp8: bool = False
    transpose_cache: bool = False
    saving: bool = False


JOBS = {
    "lora": Job("LoRA", "keep", tokens_per_s=15_000, gib=60, loops=(TRAINER, BARE, REFERENCE)),
    "lora-little": Job("LoRA", "offload", tokens_per_s=11_000, gib=17.4),
    "lora-recompute": Job("LoRA", "recompute", loops=(TRAINER,)),
    "qlora-little": Job("LoRA", "offload", in_4bit=True, tokens_per_s=9_500, gib=8.1, loops=(TRAINER, BARE, REFERENCE)),
    "control": Job("Control Adapters", "keep", tokens_per_s=16_000, gib=60),
    "full": Job("full", "keep", shape="1b"),
    "lora-fp8": Job("LoRA", "keep", tokens_per_s=19_000, gib=25.5, in_fp8=True),
    "lora-fp8-cache": Job("LoRA", "keep", tokens_per_s=20_500, gib=33, in_fp8=True, transpose_cache=True),
    "lora-fp8-little": Job("LoRA", "offload", tokens_per_s=14_500, gib=10.5, in_fp8=True),
    "control-fp8": Job("Control Adapters", "keep", tokens_per_s=20_000, gib=28, in_fp8=True),
}
ALL_LOOPS = (TRAINER, BARE, REFERENCE, FLOAT32, UNSLOTH)
WHOLE = "qwen3-moe-48"  # only its own job fits in memory
EXPERT_JOBS = {
    "experts-recompute": Job("LoRA", "recompute", False, 40_000, 18.5, ALL_LOOPS, limited="qwen3-moe"),
    "experts-keep": Job("LoRA", "keep", False, 48_000, 40, limited="qwen3-moe"),
    "experts-qlora": Job("LoRA", "recompute", True, 32_000, 9, limited="qwen3-moe"),
    "experts-attention": Job("LoRA on attention", "recompute", False, 45_000, 16.5, limited="qwen3-moe"),
    "experts-full": Job("full", "recompute", shape="tiny-moe"),
    "experts-qlora-whole": Job("LoRA", "offload", True, 8_500, 22, (TRAINER,), limited=WHOLE, saving=True),
}


def make_adapter(name: str) -> Adapter:
    attention = LoRA(RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return {
        "LoRA": LoRA(RANK),
        "LoRA on attention": attention,
        "Control Adapters": ControlAdapter(RANK),
        "full": Full(),
    }[name]


def micro_batches(shape: str, steps: int, adapter: Adapter) -> list[dict[str, Tensor]]:
    """Return sequences of one document each; a few are repeated, so that the loss falls."""
    length = SHAPES[shape]["max_position_embeddings"]
    made = random_sequences(2 * MICRO_BATCHES, length, SHAPES[shape]["vocab_size"])
    if "control_classes" in adapter.batch_keys:
        generator = torch.Generator().manual_seed(2)
        for batch in made:
            batch["control_classes"] = torch.randint(-1, 2, (1, length), generator=generator)
    return [made[number % len(made)] for number in range(steps * MICRO_BATCHES)]


def mfu(job: Job, shape: str, tokens_per_s: float) -> float:
    config = SHAPES[shape]
    h, layers, length = (config[key] for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings"))
    i = config.get("moe_intermediate_size", config["intermediate_size"]) * config.get("num_experts_per_tok", 1)
    size = config.get("head_dim", h // config["num_attention_heads"])
    q, kv = (size * config[key] for key in ("num_attention_heads", "num_key_value_heads"))
    weights = layers * (2 * h * q + 2 * h * kv + 3 * h * i) + h * config["vocab_size"]
    attention = 3 * layers * 2 * length * q  # forward, and twice that backward, over half of the pairs of tokens
    return tokens_per_s * ((6 if job.adapter == "full" else 4) * weights + attention) / PEAK_RATE
