"""Holds some rows of the embedding and the head in a separate parameter, so that only they are trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in

ROWS = "trainable_tokens_delta"
"""The parameter's name, as in PEFT; it holds the rows themselves, not a difference."""


def hold_apart(module: nn.Module, numbers: Sequence[int], dtype: torch.dtype) -> None:
    """Make an embedding or a linear layer take some rows from a trained parameter, initialised with their values.

    Neither pass allocates anything of the whole weight's size, unlike PEFT, which copies the weight in each.

    Args:
        module: The layer; its weight is left unchanged, including these rows.
        numbers: Indices of the rows, without duplicates.
        dtype: Dtype of the parameter.
    """
    mix_in(module, _EmbeddingRows if isinstance(module, nn.Embedding) else _LinearRows)
    weight: Any = module.weight
    rows = torch.tensor(numbers, dtype=torch.int64, device=weight.device)
    module.register_parameter(ROWS, nn.Parameter(weight.detach()[rows].to(dtype)))
    _number(module, rows)


def share(module: nn.Module, embedding: nn.Module) -> None:
    """Make a linear layer, the head, use the rows held by ``embedding``, to which it is tied."""
    mix_in(module, _LinearRows)
    module._shared_with = [embedding]  # type: ignore[assignment]  # in a list, so that it is not a submodule
    _number(module, embedding.row_numbers)  # type: ignore[arg-type]


def rows_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the indices and the values of the rows that a layer takes from a separate parameter; None if none."""
    if not isinstance(module, (_EmbeddingRows, _LinearRows)):
        return None
    owner: Any = module._shared_with[0] if module._shared_with else module
    return module.row_numbers, owner.get_parameter(ROWS)


def _number(module: Any, rows: Tensor) -> None:
    module.register_buffer("row_numbers", rows, persistent=False)
    if isinstance(module, nn.Embedding):
        places = torch.full(module.weight.shape[:1], -1, dtype=torch.int64, device=rows.device)
        module.register_buffer("row_places", places.index_copy(0, rows, torch.arange(len(rows)).to(rows)), False)


class _Rows(Mixin):
    mixin_place = MixinPlace.COMPUTATION
    row_numbers: Tensor
    _shared_with: Sequence[Any] = ()


class _EmbeddingRows(_Rows):
    """Mixed into an embedding."""

    row_places: Tensor

    def forward(self, input: Tensor) -> Tensor:
        places = self.row_places[input]
        apart: Any = copy.copy(self)  # to run the class's own code, as some scale what they look up
        apart._parameters = {"weight": self.get_parameter(ROWS).to(self.weight.dtype)}  # type: ignore[attr-defined]
        apart.padding_idx = None
        theirs = super(_EmbeddingRows, apart).forward(places.clamp(min=0))  # type: ignore[misc]
        return torch.where(places.unsqueeze(-1) >= 0, theirs, super().forward(input))  # type: ignore[misc]


class _LinearRows(_Rows):
    """Mixed into a linear layer."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        found = rows_of(self)  # type: ignore[arg-type]
        assert found is not None
        numbers, values = found
        theirs = linear(input, values.to(input.dtype), None if self.bias is None else self.bias[numbers])
        output: Tensor = super().forward(input)  # type: ignore[misc]
        return output.index_copy(-1, numbers, theirs)
