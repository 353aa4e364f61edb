from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from tiny_models import CUTS, POSITIONS, build, micro_batches, run_stages, train_stages, write_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.models import CausalLMLayers

torch.set_num_threads(1)


def four_bit_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("causal_lm.").replace(".base_layer", ""): dequantize_4bit(m.weight, m.weight.quant_state)
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_four_bit_stages_equal_the_unsplit_four_bit_model(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path, kind)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=quantization)
    whole.train()
    expected = four_bit_weights(whole)  # before any forward: bitsandbytes repacks weights on a CPU
    assert len(expected) == 4 * 7
    (input_ids, _), _ = micro_batches()
    with torch.no_grad():
        expected_logits = whole(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4))
    for cuts in CUTS:
        stages = build(layers, cuts)
        weights = {name: weight for stage in stages for name, weight in four_bit_weights(stage).items()}
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
        torch.testing.assert_close(run_stages(stages, input_ids, POSITIONS), expected_logits, rtol=0, atol=1e-5)
        _, gradients = train_stages(stages)
        assert len(gradients) == 4 * 7 * 2
    assert layers.parameter_counts() == CausalLMLayers(tmp_path, adapter=LoRA(4)).parameter_counts()
