"""Links between ranks, and which of them both ranks have."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_pipelite.shared.over_ranks import gathered

Link = tuple[int, int, bool]
"""The sending and the receiving global rank, and whether gradients are sent."""


def with_both_ends(here: Iterable[Link]) -> set[Link]:
    """Return the links that both of their ranks report, the same on every rank. Collective."""
    everyones = gathered(set(here))
    return {link for links in everyones for link in links if link in everyones[link[0]] and link in everyones[link[1]]}
