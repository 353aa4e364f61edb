"""Rows in groups, each of which meets a matrix of its own: the tokens of every expert.

Rows lie sorted by their group, [rows, .]; a group may have none, or all. How long groups are is known to the GPU alone,
so the work is dealt out in tiles of a few rows, of which a table says where they are (:mod:`.routing`); there is room
in it for the most tiles that there can be.
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
        order: Int32 [rows], which of all copies each is: token · copies + number.
        places: Int32 [tokens, copies], where the copies went: the other way round.
        bounds: Int32 [groups + 1], where each group begins, then the end.
        tiles: Int32 [2, most tiles], the group of each tile, -1 if there is none, and its first row.
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
        """How many copies a token has: as many as experts that it goes to."""
        return self.places.shape[1]


def rows_of_tile(rows: int, groups: int) -> int:
    """Return how many rows a tile has: about as many as a group, so that few are left empty."""
    return min(MOST_ROWS, at_least_16(max(1, rows // groups)))


def slices_of(groups: Groups) -> Iterator[tuple[int, slice]]:
    """Yield each group's number and its rows; the host waits for the GPU to learn them."""
    bounds = groups.bounds.tolist()
    yield from ((group, slice(bounds[group], bounds[group + 1])) for group in range(groups.number))
