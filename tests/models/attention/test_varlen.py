"""Attention by document bounds equals masked attention, and treats each document as if it were alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Llama4TextConfig,
    PretrainedConfig,
)

from lightning_pipelite.adapters import Full
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.attention.document_mask import document_mask, find_documents
from lightning_pipelite.models.attention.varlen import varlen_attention
from tiny_models import CPU, POSITIONS, SIZES, build, micro_batches, reference, run_stages, write_model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3"])
def test_stages_equal_each_document_alone(tmp_path: Path, kind: str) -> None:
    layers = CausalLMLayers(
        write_model(tmp_path, kind), dtype=torch.float32, adapter=Full(), attn_implementation="varlen"
    )
    stages = build(layers, [0, 2, 4])
    assert all(stage.causal_lm.config._attn_implementation == "varlen" for stage in stages)
    whole = reference(tmp_path)
    (input_ids, _), _ = micro_batches()
    logits = run_stages(stages, input_ids, POSITIONS)
    for row, length in enumerate((5, 2)):
        alone = [whole(input_ids=ids).logits for ids in input_ids[row : row + 1].split([length, 12 - length], dim=1)]
        torch.testing.assert_close(logits[row], torch.cat(alone, dim=1)[0])
    logits.sum().backward()
    assert all(p.grad is not None for stage in stages for p in stage.parameters())


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES),  # soft-capped scores
        Llama4TextConfig(**SIZES, attention_chunk_size=8),  # chunks
        FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, alibi=True),
    ],
    ids=lambda config: config.model_type,
)
def test_another_kind_of_attention_is_refused(tmp_path: Path, config: PretrainedConfig) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="set attn_implementation to auto"):
        CausalLMLayers(tmp_path, adapter=Full(), attn_implementation="varlen")
    assert CausalLMLayers(tmp_path, adapter=Full()).meta_model.isolates_documents


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_implementation_that_was_chosen_is_used(tmp_path: Path, implementation: str) -> None:
    write_model(tmp_path, "llama")
    layers = CausalLMLayers(tmp_path, adapter=Full(), attn_implementation=implementation)  # type: ignore[arg-type]
    assert layers.build_stage(0, 1, CPU).causal_lm.config._attn_implementation == implementation


@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 1.0, 3.0])], ids=["plain", "sinks"])
def test_by_hand(window: int | None, packed: bool, sinks: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 12, size) for heads, size in ((4, 8), (2, 8), (2, 6)))
    with document_mask(POSITIONS if packed else None):
        output, _ = varlen_attention(
            nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, s_aux=sinks
        )
    begins = {0: {0, 5}, 1: {0, 2}} if packed else {0: {0}, 1: {0}}
    for row in range(2):
        for place in range(12):
            first = max(begin for begin in begins[row] if begin <= place)
            first = max(first, place - (window or 12) + 1)
            for head in range(4):
                scores = 0.3 * key[row, head // 2, first : place + 1] @ query[row, head, place]
                total = scores.exp().sum() + (0 if sinks is None else sinks[head].exp())
                expected = scores.exp() / total @ value[row, head // 2, first : place + 1]
                torch.testing.assert_close(output[row, place, head], expected)


def test_bounds() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]])
    documents = find_documents(positions)
    assert documents is not None
    assert documents.numbers.tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]]
    assert documents.bounds.tolist() == [0, 3, 5, 6, 7, 10]
    expected = find_documents(positions, most=7)
    assert expected is not None
    assert expected.bounds.tolist() == [0, 3, 5, 6, 7, *[10] * 12]
    with pytest.raises(RuntimeError, match="more documents"):
        find_documents(positions, most=4)
    assert find_documents(torch.arange(5)[None]) is None


def test_what_it_does_not_do_is_an_error() -> None:
    x = torch.randn(1, 2, 4, 8)
    for asked in ({"softcap": 3.0}, {"position_bias": torch.zeros(2)}, {"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(NotImplementedError):
            varlen_attention(nn.Module(), x, x, x, None, **asked)
    with pytest.raises(NotImplementedError):
        varlen_attention(nn.Module(), x, x, x, torch.ones(4, 4))


def sinks_of(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return tensors[3] if len(tensors) > 3 else None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("most", [None, 4, 40])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_kernel_equals_float64_with_room_for_more_documents(
    window: int | None, most: int | None, compiled: bool, sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in (100, 1, 155, 256)]).view(2, 256)
    exact = [
        torch.randn(2, heads, 256, 64, dtype=torch.float64, generator=generator).requires_grad_() for heads in (8, 2, 2)
    ]
    if sinks:
        exact.append(torch.randn(8, dtype=torch.float64, generator=generator))
    low = [t.detach().cuda().bfloat16().requires_grad_() for t in exact]
    exact = [t.detach().double().cpu().requires_grad_() for t in low]
    weights = torch.randn(2, 256, 8, 64, generator=generator)
    attend = torch.compile(varlen_attention, fullgraph=True) if compiled else varlen_attention
    with document_mask(positions):
        expected, _ = varlen_attention(nn.Module(), *exact[:3], None, sliding_window=window, s_aux=sinks_of(exact))
    with document_mask(positions.cuda(), most):
        found, _ = attend(nn.Module(), *low[:3], None, sliding_window=window, s_aux=sinks_of(low))
    (expected * weights).sum().backward()
    (found * weights.cuda()).sum().backward()
    pairs = [(found.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(low, exact, strict=True))]
    for ours, theirs in pairs:
        assert (ours.cpu().double() - theirs).norm() < 1e-2 * theirs.norm()
