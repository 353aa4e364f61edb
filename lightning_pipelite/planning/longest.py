"""Finds the largest size that fits in few trials, if what it takes grows almost linearly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


def find_longest(excess: Callable[[int], float], known: Mapping[int, float], most: int, step: int) -> int:
    """Return the largest multiple of ``step`` that fits; 0 if none does.

    The returned length was tried and fits. That nothing longer fits follows from the line through the two longest
    lengths that fit: the curve is convex and so lies above that line, which meets the limit where the curve does, or
    beyond.

    Args:
        excess: Tries a length and returns by how much it exceeds the limit: 0 or less if it fits. It grows with the
            length.
        known: The excess of some lengths: of 0 and at least one more.
        most: The largest length to try.
        step: Lengths are multiples of it.
    """
    tried = dict(known)
    while True:
        high = min((length for length, by in tried.items() if by > 0), default=math.inf)
        fitting = sorted(length for length in tried if length < high)
        if not fitting:
            return 0
        low = fitting[-1]
        bottom = min(low, most) // step * step
        top = int(min(most, high - 1)) // step * step
        meets = _root(tried, *fitting[-2:]) if len(fitting) > 1 else math.inf
        sure = len(fitting) > 2 and meets < high  # for short lengths it may grow faster at first
        if meets >= high and high in tried:
            meets = _root(tried, low, int(high))
        guess = int(min(meets, top)) // step * step
        if guess <= bottom:
            guess = bottom if sure else min(bottom + step, top)
        if guess in tried:
            return guess
        tried[guess] = excess(guess)


def _root(points: Mapping[int, float], a: int, b: int) -> float:
    """Return where the line through two points meets 0; infinity if it does not rise."""
    rise = points[b] - points[a]
    return a - points[a] * (b - a) / rise if rise > 0 else math.inf
