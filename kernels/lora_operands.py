"""What a linear layer with its adapters computes with, flat as an operation's schema takes it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """What the operation computes with beside x, and its backward pass as well.

    A schema knows tensors, numbers and lists of them, but no structures: operations take :meth:`flat` of it.

    Attributes:
        down: All Aᵢ on end [ranks, in], in x's dtype; nothing where the projections are given.
        along: x·Aᵀ [tokens, ranks]; or the given projections, one by one.
        ups: Bᵢ in x's dtype.
        weights: Of each frozen weight its parts.
        biases: Of each weight nothing, or its bias.
        row_scales: Of x's codes, if products are computed in FP8 [tokens].
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
        return cls(down, along, ups, others[: len(ups)], others[len(ups) :], row_scales, scales)

    @property
    def ranks(self) -> list[int]:
        """The rank of each adapter."""
        return [up.shape[1] for up in self.ups]

    @property
    def alongs(self) -> list[Tensor]:
        """What each Bᵢ is multiplied with [tokens, rank]."""
        one_by_one = len(self.along) == len(self.ups)
        return self.along if one_by_one else [*self.along[0].split(self.ranks, dim=1)]
