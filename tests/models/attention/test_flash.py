"""FlashAttention with sinks equals eager attention, forward and backward; its operations are emulated on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from flash_on_cpu import flash_on_cpu
from lightning_pipelite.adapters import Full
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.attention.document_mask import document_mask
from lightning_pipelite.models.attention.varlen import varlen_attention
from tiny_models import CPU, POSITIONS, SIZES, micro_batches


@pytest.mark.parametrize(
    ("window", "packed", "compiled"),
    [(None, False, False), (None, True, False), (3, False, False), (3, True, False), (3, True, True)],
)
def test_it_equals_one_more_key_for_each_head(window: int | None, packed: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, heads, 12, size, requires_grad=True) for heads, size in ((4, 16), (2, 16), (2, 12))]
    exact.append((2 * torch.randn(4)).requires_grad_())
    ours = [t.detach().clone().requires_grad_() for t in exact]
    weights = torch.randn(2, 12, 4, 12)
    attend = torch.compile(varlen_attention, backend="aot_eager", fullgraph=True) if compiled else varlen_attention
    with document_mask(POSITIONS if packed else None):
        expected, _ = varlen_attention(nn.Module(), *exact[:3], None, 0.0, 0.3, window, s_aux=exact[3])
        with flash_on_cpu():
            found, _ = attend(nn.Module(), *ours[:3], None, 0.0, 0.3, window, s_aux=ours[3])
            (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    for tensor, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_model_with_sinks_has_the_logits_and_gradients_of_transformers(tmp_path: Path, kernel: bool) -> None:
    """Including the gradients of the sinks, with each document separate, in layers with and without a window."""
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, pad_token_id=0)
    whole = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in whole.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    whole.save_pretrained(tmp_path)
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(), attn_implementation="varlen")
    stage = layers.build_stage(0, 4, CPU)
    (input_ids, _), _ = micro_batches()
    with flash_on_cpu() if kernel else document_mask(None):
        logits = stage((input_ids, POSITIONS))
        logits.square().sum().backward()
    for row, length in enumerate((5, 2)):
        parts = input_ids[row : row + 1].split([length, 12 - length], dim=1)
        alone = torch.cat([whole(input_ids=ids).logits for ids in parts], dim=1)
        torch.testing.assert_close(logits[row], alone[0])
        alone.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found = {name: parameter.grad for name, parameter in stage.causal_lm.named_parameters()}
    assert found.keys() == expected.keys()
    assert sum(name.endswith("sinks") for name in found) == 4
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))
