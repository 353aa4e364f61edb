"""What a LoRA may adapt; and what it is said to take instead where PEFT could not load it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from tiny_families import tiny


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
def test_the_targets_that_are_proposed_can_be_loaded(model_type: str, tmp_path: Path) -> None:
    """Of mixtures whose dense layers have linear modules of the experts' names, which PEFT takes for theirs."""
    AutoModelForCausalLM.from_config(tiny(model_type), dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"name other target_modules, such as \[.*\]\.$") as refused:
        CausalLMLayers(tmp_path, adapter=LoRA(rank=2), dtype=torch.float32)
    named = re.findall(r"\w+", str(refused.value).rpartition("[")[2])
    layers = CausalLMLayers(tmp_path, adapter=LoRA(rank=2, target_modules=named), dtype=torch.float32)
    assert layers.parameter_counts()
