"""The operands of linear layers with adapters, flattened for an operation's schema."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The operands, besides x, of the operation and its backward pass.

    A schema allows tensors, numbers and lists of them, but no structures: operations take the result of :meth:`flat`.

    Attributes:
        down: All Aᵢ concatenated [ranks, in], in x's dtype; empty where the projections are given.
        along: x·Aᵀ [tokens, ranks]; or the given projections, one by one.
        ups: Bᵢ in x's dtype.
        weights: The parts of each frozen weight; or those of a single one, in FP8, that holds all consecutively.
        biases: For each weight its bias, or nothing.
        row_scales: The scales of x's codes [tokens], if products are computed in FP8.
        scales: The scale sᵢ of each.
    """

    down: list[Tensor]
    along: list[Tensor]
    ups: list[Tensor]
    weights: list[list[Tensor]]
    biases: list[list[Tensor]]
    row_scales: list[Tensor]
    scales: list[float]

    def flat(self) -> tuple[list[Tensor], list[int], list[float]]:
        """Return all tensors in one list, the length of each list that they come from, and the scales."""
        lists = [self.down, self.along, self.ups, self.row_scales, *self.weights, *self.biases]
        return [tensor for each in lists for tensor in each], [len(each) for each in lists], self.scales

    @classmethod
    def of(cls, tensors: Sequence[Tensor], counts: Sequence[int], scales: list[float]) -> Operands:
        """Return the operands that :meth:`flat` laid out."""
        places = iter(tensors)
        down, along, ups, row_scales, *others = ([*itertools.islice(places, count)] for count in counts)
        weights = len(others) // 2
        return cls(down, along, ups, others[:weights], others[weights:], row_scales, scales)

    @property
    def ranks(self) -> list[int]:
        """The rank of each adapter."""
        return [up.shape[1] for up in self.ups]

    @property
    def joined(self) -> bool:
        """Whether a single weight holds those of several projections."""
        return len(self.weights) < len(self.ups)

    @property
    def alongs(self) -> list[Tensor]:
        """x·Aᵢᵀ, or the given projection, of each adapter [tokens, rank]."""
        one_by_one = len(self.along) == len(self.ups)
        return self.along if one_by_one else [*self.along[0].split(self.ranks, dim=1)]
