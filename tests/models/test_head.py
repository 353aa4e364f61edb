"""The fused head and loss give the unsplit model's loss and gradients, whatever its code does to the logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.head import HeadInputs, fuse_head
from lightning_pipelite.models.loss import CausalLMLoss
from tiny_models import CPU, POSITIONS, SIZES, micro_batches, write_model

CONFIGS: dict[str, tuple[PretrainedConfig, float, float | None]] = {
    "plain": (LlamaConfig(**SIZES), 1.0, None),
    "tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), 1.0, None),
    "scaled": (CohereConfig(**SIZES, logit_scale=0.0625), 0.0625, None),
    "divided": (GraniteConfig(**SIZES, logits_scaling=3.0), 1 / 3, None),
    "limited": (Gemma2Config(**SIZES, final_logit_softcapping=5.0), 1.0, 5.0),
    "biased": (GPTJConfig(vocab_size=128, n_embd=64, n_layer=4, n_head=4, rotary_dim=8), 1.0, None),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("cuts", [[0, 4], [0, 2, 4]])
def test_loss_and_gradients(tmp_path: Path, kind: str, cuts: list[int]) -> None:
    config, scale, softcap = CONFIGS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    (ids, labels), _ = micro_batches()
    labels[0, 3] = -100
    logits = whole(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(), fuse_head=True)
    stages = [layers.build_stage(a, b, CPU) for a, b in itertools.pairwise(cuts)]
    assert stages[-1].fused_head is not None
    assert stages[-1].fused_head.scale == pytest.approx(scale, rel=1e-6)
    assert stages[-1].fused_head.softcap == softcap
    assert all(stage.fused_head is None for stage in stages[:-1])
    passed = stages[0]((ids, POSITIONS))
    for stage in stages[1:]:
        passed = stage(passed)
    assert isinstance(passed, HeadInputs)
    total, count = CausalLMLoss()(passed, labels)
    assert count == ids.numel() - 1
    torch.testing.assert_close(total, expected)
    total.backward()
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.causal_lm.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = gradients.get(name, 0) + parameter.grad
    for name, parameter in whole.named_parameters():
        size = parameter.grad.abs().max() + 1e-3
        torch.testing.assert_close(gradients[name] / size, parameter.grad / size, rtol=0, atol=1e-5, msg=name)


def test_frozen_head_gets_no_gradient(tmp_path: Path) -> None:
    layers = CausalLMLayers(write_model(tmp_path, "llama"), dtype=torch.float32, adapter=LoRA(4), fuse_head=True)
    stage = layers.build_stage(0, 4, CPU)
    (ids, labels), _ = micro_batches()
    CausalLMLoss()(stage((ids, POSITIONS)), labels)[0].backward()
    assert all((p.grad is not None) == p.requires_grad for p in stage.parameters())


def test_head_of_which_something_else_is_made_gives_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, "llama")
    forward = LlamaForCausalLM.forward

    def squashed(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.logits = 4.0 * outputs.logits.sigmoid()
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", squashed)
    stage = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(), fuse_head=True).build_stage(0, 4, CPU)
    assert stage.fused_head is None
    (ids, labels), _ = micro_batches()
    logits = stage((ids, POSITIONS))
    assert logits.shape == (2, 12, 128)
    CausalLMLoss()(logits, labels)[0].backward()


def test_head_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path, "llama"))
    assert fuse_head(model, model.lm_head) is not None
    assert fuse_head(model, nn.Sequential(model.lm_head)) is None


def test_finding_out_draws_no_random_numbers(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    drawn = []
    for fused in (False, True):
        layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=LoRA(4, dropout=0.5), fuse_head=fused)
        torch.manual_seed(3)
        layers.build_stage(2, 4, CPU)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]
