"""Tiny causal LMs on disk, and the reference that stages are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from lightning_pipelite.adapters import Adapter
from lightning_pipelite.models import CausalLMLayers, Stage

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    # Sliding and full attention with two rotary bases, a scaled embedding tied to the head, soft-capped logits.
    "gemma3": Gemma3TextConfig(
        **SIZES,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=3.0,
    ),
}
CUTS = ([0, 4], [0, 2, 4], [0, 1, 4], [0, 1, 2, 3, 4])
# Two packed rows: documents of 5 and 7 tokens, and of 2 and 10.
POSITIONS = torch.tensor([[*range(5), *range(7)], [*range(2), *range(10)]])


def write_model(directory: Path, kind: str, max_shard_size: str = "5GB") -> Path:
    """Save a random float32 model whose norms and biases differ from their trivial initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def reference(directory: Path) -> PreTrainedModel:
    """Return the unsplit model in training mode."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    """Return two micro-batches of input ids and labels, each [2, 12]."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, 128, (2, 2, 12), generator=generator).unbind()) for _ in range(2)]  # type: ignore[misc]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def build(layers: CausalLMLayers, cuts: Sequence[int]) -> list[Stage]:
    return [layers.build_stage(start, stop, CPU) for start, stop in itertools.pairwise(cuts)]


def give_b_values(stages: Sequence[Stage]) -> None:
    """Give the factors of adapters that start at zero values that do not depend on the cut."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if "lora_B" in name or "control_S" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))


def classes_for(adapter: Adapter) -> list[Tensor] | None:
    """Return the Control Adapter's classes of two micro-batches; None for other adapters."""
    return [torch.ones(2, 12, dtype=torch.int64)] * 2 if adapter.batch_keys else None


def held(layers: CausalLMLayers) -> dict[str, Tensor]:
    """Return the weights of two stages, by their names in the model."""
    return {
        name.replace(".base_layer", ""): tensor
        for stage in build(layers, [0, 2, 4])
        for name, tensor in stage.causal_lm.state_dict().items()
        if "lora_" not in name
    }


def run_stages(stages: list[Stage], input_ids: Tensor, position_ids: Tensor, *extra: Tensor) -> Tensor:
    """Return the logits of a chain of stages."""
    passed: tuple[Tensor, ...] | Tensor = (input_ids, position_ids, *extra)
    for stage in stages:
        passed = stage(passed)
    assert isinstance(passed, Tensor)
    return passed


def train_stages(
    stages: list[Stage], positions: Tensor = POSITIONS, classes: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run forward and backward as a pipeline does: tensors detached between stages, gradients passed back.

    All micro-batches, each with its ``classes`` as extra input, run forward before any runs backward, which exposes a
    stage that mixes up its micro-batches.

    Returns:
        The logits of each micro-batch, and the gradients by name, summed over stages that share a name.
    """
    tapes: list[list[tuple[Tensor, Tensor]]] = []
    logits = []
    for number, (input_ids, labels) in enumerate(micro_batches()):
        tape = []
        received, class_ids = input_ids, torch.tensor([7, 8]) if classes is None else classes[number]
        for stage in stages:
            received = received.detach().requires_grad_(received.is_floating_point())
            output = stage((received, positions, class_ids))
            if stage is stages[-1]:
                logits.append(output.detach())
                tape.append((received, cross_entropy(output, labels)))
            else:
                assert output[1] is positions
                assert output[2] is class_ids
                tape.append((received, output[0]))
                received = output[0]
        tapes.append(tape)
    for tape in tapes:
        gradient = None
        for received, output in reversed(tape):
            if output.requires_grad:
                output.backward(gradient)
            gradient = received.grad
    gradients: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad
    return logits, gradients


def train_whole(model: PreTrainedModel) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run the same micro-batches through the unsplit model."""
    logits = []
    for input_ids, labels in micro_batches():
        output = model(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
        logits.append(output.detach())
        cross_entropy(output, labels).backward()
    return logits, {f"causal_lm.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
