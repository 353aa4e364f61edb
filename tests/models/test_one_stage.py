"""Models that cannot be cut train in one stage, and PEFT loads the adapters that they save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig

import tiny_families
from exact_training import LOSS_LIMIT, WEIGHT_LIMIT, Case, Split
from family_training import try_family
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.adapters.lora_targets import lora_targets
from lightning_pipelite.cli.plan_command import plan
from lightning_pipelite.cli.split_comparison import DOCUMENTS, relative, tokens
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.strategy.partition import partition
from plan_cases import write_config
from processes import Workers
from tiny_models import CPU

torch.set_num_threads(1)


def uncut(model_type: str) -> PretrainedConfig:
    """Return a Gemma 3n or 4 whose last half of layers uses keys and values of the first, so it cannot be cut."""
    config = tiny_families.tiny(model_type)
    config.num_kv_shared_layers = 2
    return config


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])  # per-layer embeddings, shared keys
def test_a_trained_adapter_gives_the_same_with_peft(tmp_path: Path, model_type: str) -> None:
    base = tmp_path / "base"
    tiny_families.write(uncut(model_type), base)
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=LoRA(4))
    assert layers.meta_model.one_stage_only
    assert len(layers) == 1
    stage = layers.build_stage(0, 1, CPU)
    input_ids = tokens()[0][:1]
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
    before = stage((input_ids, positions)).detach()
    for _ in range(2):
        stage((input_ids, positions)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = stage.eval()((input_ids, positions)).detach()
    assert relative(trained, before) > 1e-3
    layers.adapter.save(tmp_path / "adapter", [layers.trained_state(stage)], base)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "adapter")
    ).eval()
    with torch.no_grad():
        alone = [loaded(input_ids=ids, use_cache=False).logits for ids in input_ids.split(DOCUMENTS, dim=1)]
    assert relative(trained, torch.cat(alone, dim=1)) <= 1e-5


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_two_replicas_train_as_a_plain_loop(workers: Workers, model_type: str) -> None:
    loss, weight = try_family(workers, model_type, Case("LoRA"), 2, Split(1, 2))
    assert loss <= LOSS_LIMIT
    assert weight <= WEIGHT_LIMIT


def test_a_plan_is_of_one_stage(tmp_path: Path) -> None:
    uncut("gemma4_text").save_pretrained(tmp_path / "base")
    config = write_config(tmp_path / "config.yaml", tmp_path / "base", stages=1)
    report = str(plan(str(config), devices=2, memory="1GiB"))
    assert "Recommended: pipeline_stages: 1, activation_memory: " in report
    assert "2 replicas" in report


def test_a_layer_whose_weight_training_takes_directly_has_no_adapter(tmp_path: Path) -> None:
    tiny_families.write(uncut("gemma3n_text"), tmp_path)
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=LoRA(4))
    targets, _ = lora_targets(layers.meta_model, "all-linear", None)
    assert any(name.endswith("altup.prediction_coefs") for name in targets)
    assert not any(name.endswith("altup.correction_coefs") for name in targets)
    with pytest.raises(ConfigurationError, match=r"correction_coefs, whose weight this model uses without calling"):
        CausalLMLayers(tmp_path, adapter=LoRA(4, target_modules=["q_proj", "correction_coefs"]))
    stage = layers.build_stage(0, 1, CPU).train()
    stage((tokens()[0][:1], torch.arange(tokens()[0].shape[1])[None])).pow(2).mean().backward()
    assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)


def test_layers_left_out_at_random_have_adapters_and_are_not_cut(tmp_path: Path) -> None:
    config = tiny_families.tiny("opt")
    config.layerdrop = 0.5
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    layers = CausalLMLayers(tmp_path, adapter=LoRA(4))
    targets, _ = lora_targets(layers.meta_model, "all-linear", None)
    assert len(targets) == 6 * config.num_hidden_layers
    with pytest.raises(ConfigurationError, match="layerdrop skips decoder layers at random"):
        partition(layers, 2)
