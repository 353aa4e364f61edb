"""The routers' load-balancing loss across stages is that of the unsplit model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    JambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, Stage
from lightning_pipelite.models.loss import CausalLMLoss
from tiny_models import CUTS, SIZES, build, micro_batches

COEFFICIENT = 0.3
OPTIONS = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, **OPTIONS),
    # Experts in every other layer, so that a stage may have no router.
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, decoder_sparse_step=2, **OPTIONS
    ),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **OPTIONS),
    "jamba": JambaConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
        attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, **OPTIONS,
    ),
}  # fmt: skip


def write(directory: Path, kind: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def train(stages: list[Stage], loss: CausalLMLoss, ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Run as a pipeline does, with a gradient for every floating-point tensor; return the terms of the loss."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    passed: tuple[Tensor, ...] = (ids, positions)
    tape = []
    for stage in stages[:-1]:
        given = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in passed)
        passed = stage(given)
        tape.append((given, passed))
    given = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in passed)
    terms = loss(stages[-1](given), labels)
    (terms[0] / terms[1]).backward()
    for before, outputs in reversed(tape):
        floats = [(out, t.grad) for out, t in zip(outputs, given, strict=True) if t.is_floating_point()]
        trained = [(out, gradient) for out, gradient in floats if out.requires_grad]
        if trained:
            torch.autograd.backward([out for out, _ in trained], [gradient for _, gradient in trained])
        given = before
    return terms


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    assert whole.config.output_router_logits
    ids, labels = micro_batches()[0]
    result = whole(input_ids=ids, use_cache=False)
    expected = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1), labels.flatten())
    (expected + COEFFICIENT * result.aux_loss).backward()
    recompute = "recompute" if kind != "jamba" else "keep"
    layers = CausalLMLayers(
        tmp_path, dtype=torch.float32, adapter=Full(), packed=kind != "jamba", activation_memory=recompute
    )
    loss = CausalLMLoss(layers.router_loss.coefficient)
    for cuts in CUTS:
        stages = build(layers, cuts)
        total, count, balance = train(stages, loss, ids, labels)
        torch.testing.assert_close(balance / count, result.aux_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total / count, expected + COEFFICIENT * result.aux_loss, rtol=1e-5, atol=1e-6)
        found = {name: p.grad for stage in stages for name, p in stage.causal_lm.named_parameters()}
        for name, parameter in whole.named_parameters():
            if parameter.grad is not None:
                assert found[name] is not None, name
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_first_stage(tmp_path: Path) -> None:
    layers = CausalLMLayers(
        write(tmp_path, "mixtral"), dtype=torch.float32, adapter=LoRA(rank=4, layers_to_transform="3")
    )
    stages = build(layers, [0, 2, 4])
    train(stages, CausalLMLoss(COEFFICIENT), *micro_batches()[0])
    trained = [(name, p) for name, p in stages[1].named_parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for _, p in trained)


def test_the_option_decides_before_the_file(tmp_path: Path) -> None:
    write(tmp_path, "mixtral")
    assert CausalLMLayers(tmp_path, adapter=Full(), router_aux_loss_coef=0).router_loss is None
    assert CausalLMLayers(tmp_path, adapter=Full(), router_aux_loss_coef=0.5).router_loss.coefficient == 0.5
    config = json.loads((tmp_path / "config.json").read_text()) | {"output_router_logits": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert CausalLMLayers(tmp_path, adapter=Full()).router_loss is None
    assert CausalLMLayers(tmp_path, adapter=Full(), router_aux_loss_coef=0.5).router_loss.coefficient == 0.5


def test_evaluation_is_the_cross_entropy_alone(tmp_path: Path) -> None:
    layers = CausalLMLayers(write(tmp_path, "mixtral"), dtype=torch.float32, adapter=Full())
    first, last = (stage.eval() for stage in build(layers, [0, 2, 4]))
    ids, labels = micro_batches()[0]
    loss = CausalLMLoss(COEFFICIENT)
    outputs = last(first((ids, torch.arange(ids.shape[1]).expand_as(ids))))
    total, _, balance = loss(outputs, labels)
    assert balance == 0
    assert total == torch.nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")


def test_model_without_routers_is_refused(tmp_path: Path) -> None:
    from tiny_models import write_model

    write_model(tmp_path, "llama")
    with pytest.raises(ConfigurationError, match="no auxiliary loss for its routers; set router_aux_loss_coef to 0"):
        CausalLMLayers(tmp_path, adapter=Full(), router_aux_loss_coef=0.1)
