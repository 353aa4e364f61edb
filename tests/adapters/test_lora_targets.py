"""A LoRA that PEFT could not load is refused, with targets that work instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from tiny_families import tiny
from tiny_models import build


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
def test_the_targets_that_are_proposed_can_be_loaded(model_type: str, tmp_path: Path) -> None:
    """In these mixtures, linear modules of dense layers have the experts' names, so PEFT mistakes them for experts."""
    AutoModelForCausalLM.from_config(tiny(model_type), dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"choose other target_modules, such as \[.*\]\.$") as refused:
        CausalLMLayers(tmp_path, adapter=LoRA(rank=2), dtype=torch.float32)
    named = re.findall(r"\w+", str(refused.value).rpartition("[")[2])
    layers = CausalLMLayers(tmp_path, adapter=LoRA(rank=2, target_modules=named), dtype=torch.float32)
    (stage,) = build(layers, [0, len(layers)])
    layers.adapter.save(tmp_path / "adapter", [layers.trained_state(stage)], tmp_path)
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(theirs)
    assert loaded.keys() == saved.keys()
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
