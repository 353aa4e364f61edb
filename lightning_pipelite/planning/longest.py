"""The most of something that fits, found in few trials where what it takes grows in nearly a straight line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


def find_longest(excess: Callable[[int], float], known: Mapping[int, float], most: int, step: int) -> int:
    """Return the largest multiple of ``step`` that fits; 0 if none does.

    What is returned was tried, and fits. That nothing longer fits is told by the line through the two longest that fit:
    it meets the limit where the curve does, or beyond, as what grows faster and faster lies above it.

    Args:
        excess: Tries a length; returns by how much it is too much, nothing or less if it fits. It grows with the
            length.
        known: The same of some lengths, 0 among them and one more.
        most: No longer one is tried.
        step: What lengths are multiples of.
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
        sure = len(fitting) > 2 and meets < high  # what little lengths take may grow faster at first
        if meets >= high and high in tried:
            meets = _root(tried, low, int(high))
        guess = int(min(meets, top)) // step * step
        if guess <= bottom:
            guess = bottom if sure else min(bottom + step, top)
        if guess in tried:
            return guess
        tried[guess] = excess(guess)


def _root(points: Mapping[int, float], a: int, b: int) -> float:
    """Where the line through two points meets 0; infinitely far away if it does not rise."""
    rise = points[b] - points[a]
    return a - points[a] * (b - a) / rise if rise > 0 else math.inf
