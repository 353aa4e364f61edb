"""Which ranks send to which, and what all of them have in common."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_pipelite.shared.over_ranks import gathered

Link = tuple[int, int, bool]
"""From which global rank to which, and whether gradients travel."""


def with_both_ends(here: Iterable[Link]) -> set[Link]:
    """Return the links of which both ranks give that they have them, the same on every rank. Collective."""
    everyones = gathered(set(here))
    return {link for links in everyones for link in links if link in everyones[link[0]] and link in everyones[link[1]]}
