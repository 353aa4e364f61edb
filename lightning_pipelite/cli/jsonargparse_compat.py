"""What of jsonargparse has to be put right."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, get_args

from jsonargparse import ArgumentParser


def take_integers_first(parser: ArgumentParser) -> None:
    """Let options that take an integer or a float take ``1`` for the integer.

    To Lightning, ``limit_train_batches`` is one batch if it is 1, and all of them if it is 1.0. jsonargparse tries the
    types in the order in which they are written, but for ``Union[int, float, None]`` typing gives whatever it was asked
    for first of all that are equal to it, ``Union[float, int, None]`` too: by what came first, ``1`` was 1.0.
    ``int | float`` is made anew each time. To be removed when jsonargparse takes an integer for one in any order.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if {int, float} <= set(kinds):
            others = [kind for kind in kinds if kind not in (int, float)]
            hint: Any = reduce(or_, [int, float, *others])
            action._typehint = hint  # type: ignore[attr-defined]
