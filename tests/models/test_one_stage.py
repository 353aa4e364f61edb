"""What cannot be cut trains in one stage, and what is saved loads with PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny_families
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.cli.split_comparison import DOCUMENTS, relative, tokens
from lightning_pipelite.models import CausalLMLayers
from tiny_models import CPU

torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])  # embeddings for each layer, shared keys
def test_a_trained_adapter_gives_the_same_with_peft(tmp_path: Path, model_type: str) -> None:
    base = tmp_path / "base"
    tiny_families.write(tiny_families.tiny(model_type), base)
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
