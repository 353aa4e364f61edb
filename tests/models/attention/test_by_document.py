"""Layers that carry a state from token to token run on each packed document separately."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_families
from lightning_pipelite.cli.split_comparison import cross_entropy, exact_layers, relative
from lightning_pipelite.models.attention.by_document import run_by_document
from lightning_pipelite.models.attention.document_batches import DocumentBatches
from lightning_pipelite.models.attention.document_mask import document_mask
from tiny_models import CPU

torch.set_num_threads(1)
LENGTHS = ([5, 7, 1, 11], [3, 9, 12])  # documents' lengths in each of two rows


def positions_of(*rows: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


class Carries(nn.Module):
    """A cumulative sum over tokens that takes the kinds of arguments that models pass to layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.seen: list[torch.Size] = []

    def forward(self, hidden: Tensor, mask: Tensor, turned: tuple[Tensor, Tensor], other: int) -> tuple[Tensor, Tensor]:
        self.seen.append(hidden.shape)
        attended = mask.to(hidden.dtype)[:, 0] @ hidden
        return (hidden * self.scale).cumsum(1) + attended * turned[0] + other * turned[1], hidden.sum(1)


def test_documents_are_rows_of_their_own_with_all_that_is_by_token() -> None:
    layer = Carries()
    positions = positions_of(*LENGTHS)
    rows, seq = positions.shape
    hidden = torch.randn(rows, seq, 3, requires_grad=True)
    turned = (torch.randn(1, seq, 3), torch.randn(rows, seq, 3))
    mask = torch.ones(rows, 1, seq, seq, dtype=torch.bool).tril()
    expected = []
    for row, lengths in enumerate(LENGTHS):
        for first, after in itertools.pairwise([0, *itertools.accumulate(lengths)]):
            own = slice(first, after)
            sliced = (turned[0][:, own], turned[1][row : row + 1, own])
            expected.append(layer(hidden[row : row + 1, own], mask[:1, :, own, own], sliced, 2)[0][0])
    joined = torch.cat(expected).view(rows, seq, 3)
    weights = torch.randn_like(joined)
    (wanted,) = torch.autograd.grad((joined * weights).sum(), hidden)
    run_by_document(nn.ModuleList([layer]), ["0"])
    layer.seen.clear()
    with document_mask(positions):
        output, state = layer(hidden, mask=mask, turned=turned, other=2)
    (gradient,) = torch.autograd.grad((output * weights).sum(), hidden)
    torch.testing.assert_close(output, joined, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5)
    assert state is None
    assert sum(shape[0] for shape in layer.seen) == sum(map(len, LENGTHS))
    assert len(layer.seen) == 4  # batches of lengths 1, 3 to 4, 5 to 8 and 9 to 16
    assert sum(shape[:2].numel() for shape in layer.seen) <= 2 * positions.numel()


def test_one_document_a_row_runs_as_it_is() -> None:
    layer = Carries()
    run_by_document(nn.ModuleList([layer]), ["0"])
    hidden = torch.randn(2, 6, 3)
    with document_mask(positions_of([6], [6])):
        layer(hidden, torch.ones(2, 1, 6, 6, dtype=torch.bool), (hidden, hidden), 0)
    assert layer.seen == [hidden.shape]


def test_what_is_by_token_in_an_unknown_way_is_refused() -> None:
    batches = DocumentBatches.of(torch.tensor([0, 5, 12], dtype=torch.int32), (1, 12))
    with pytest.raises(NotImplementedError, match="shape"):
        batches.deal(torch.zeros(3, 12, 4), batches.places[0])


@pytest.mark.parametrize("model_type", ["lfm2", "mamba2", "minimax", "qwen3_next"])  # benchmarks/coverage.py tries all
def test_gradients_of_packed_documents_are_those_of_each_alone(tmp_path: Path, model_type: str) -> None:
    """In two stages with recomputation. The model on its own lets documents of a row mix, so the check can fail."""
    whole = tiny_families.write(tiny_families.tiny(model_type), tmp_path).train()
    layers = exact_layers(tmp_path, packed=True)
    assert layers.meta_model.by_document
    assert layers.activation_memory == "recompute"
    stages = [layers.build_stage(start, stop, CPU) for start, stop in ((0, 2), (2, len(layers)))]
    positions = positions_of(*LENGTHS)
    input_ids = torch.randint(3, 120, positions.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 120, positions.shape, generator=torch.Generator().manual_seed(2))
    received = stages[0]((input_ids, positions))
    logits = stages[1](received)
    cross_entropy(logits, labels).backward()

    alone = []
    for row, lengths in enumerate(LENGTHS):
        for ids in input_ids[row : row + 1].split(lengths, dim=1):
            alone.append(whole(input_ids=ids, use_cache=False).logits[0])
    joined = torch.cat(alone).view_as(logits)
    cross_entropy(joined, labels).backward()
    assert relative(logits, joined) <= 1e-5
    embedding = layers.meta_model.embedding_name + ".weight"
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found: dict[str, Any] = dict.fromkeys(wanted, 0)
    for stage in stages:
        for name, parameter in stage.causal_lm.named_parameters():
            found[name if name in wanted else embedding] += parameter.grad  # a tied head's is the embedding's
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) <= 1e-5, name
    assert relative(whole(input_ids=input_ids, use_cache=False).logits[:, 12:], joined[:, 12:]) > 1e-3
