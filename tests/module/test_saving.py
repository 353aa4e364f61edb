"""What is saved along with a model, beyond what the adapters' own tests cover."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_pipelite.adapters import Adapter, Full, LoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.module.saving import Saving
from tiny_models import write_model


@pytest.mark.parametrize(("adapter", "has_it"), [(Full(), True), (LoRA(2), False)])
def test_a_model_goes_with_the_template_of_its_training(adapter: Adapter, has_it: bool, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(base)
    layers = CausalLMLayers(str(base), dtype=torch.float32, adapter=adapter)
    stage = layers.build_stage(0, len(layers), torch.device("cpu"))
    strategy: Any = SimpleNamespace(
        topology=SimpleNamespace(stages=1, rank_of=lambda *_: 0), is_global_zero=True,
        collect_stages=lambda state: iter([state]), broadcast=lambda failure: failure,
    )  # fmt: skip
    template = "{{ messages[0].content }}!"
    assert isinstance(stage, nn.Module)
    Saving(layers, adapter).save(tmp_path / "out", stage, layers.trained_state(stage), strategy, template)
    assert (tmp_path / "out" / "chat_template.jinja").exists() == has_it
    if has_it:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
