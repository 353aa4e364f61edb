"""Which ranks send to which, and what all of them have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

Link = tuple[int, int, bool]
"""From which global rank to which, and whether gradients travel."""


def gathered(value: Any) -> list[Any]:
    """Return what each rank gives. Collective over all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def with_both_ends(here: Iterable[Link]) -> set[Link]:
    """Return the links of which both ranks give that they have them, the same on every rank. Collective."""
    everyones = gathered(set(here))
    return {link for links in everyones for link in links if link in everyones[link[0]] and link in everyones[link[1]]}
