"""Rows in groups, each of which is multiplied by its own matrix: the tokens of each expert.

Rows are sorted by group, [rows, .]; a group may be empty, or hold all rows. Only the GPU knows how long the groups are,
so the work is divided into tiles of a few rows, listed in a table (:mod:`.routing`) with room for the largest possible
number of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from lightning_pipelite.kernels.device import at_least_16

MOST_ROWS = 128  # of a tile


class Groups(NamedTuple):
    """Where the rows of each group are.

    Attributes:
        order: Int32 [rows], the copy that each row is: token · copies + number.
        places: Int32 [tokens, copies], the row of each copy: the inverse of ``order``.
        bounds: Int32 [groups + 1], the first row of each group, then the end.
        tiles: Int32 [2, most tiles], each tile's group (-1 for an unused tile) and first row.
    """

    order: Tensor
    places: Tensor
    bounds: Tensor
    tiles: Tensor

    @property
    def number(self) -> int:
        """The number of groups."""
        return self.bounds.shape[0] - 1

    @property
    def copies(self) -> int:
        """The number of copies of a token: one for each expert that it is routed to."""
        return self.places.shape[1]


def rows_of_tile(rows: int, groups: int) -> int:
    """Return the number of rows of a tile: about as many as a group has, so that few are wasted."""
    return min(MOST_ROWS, at_least_16(max(1, rows // groups)))


def slices_of(groups: Groups) -> Iterator[tuple[int, slice]]:
    """Yield each group's number and its rows; this synchronises the host with the GPU."""
    bounds = groups.bounds.tolist()
    yield from ((group, slice(bounds[group], bounds[group + 1])) for group in range(groups.number))
