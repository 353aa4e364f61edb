"""Workarounds for jsonargparse."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, get_args

from jsonargparse import ArgumentParser


def take_integers_first(parser: ArgumentParser) -> None:
    """Make options that take an int or a float read ``1`` as an int.

    To Lightning, ``limit_train_batches`` is one batch if it is 1, and all of them if it is 1.0. jsonargparse tries the
    types in the order of the union. But ``typing`` has a cache in which unions of another order are equal:
    ``Optional[Union[int, float]]`` returns ``Optional[Union[float, int]]`` if that was created first, and ``1`` is then
    read as 1.0. ``int | float`` is not cached. Remove when jsonargparse reads an integer as an int in any order.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if {int, float} <= set(kinds):
            others = [kind for kind in kinds if kind not in (int, float)]
            hint: Any = reduce(or_, [int, float, *others])
            action._typehint = hint  # type: ignore[attr-defined]
