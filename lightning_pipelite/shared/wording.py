"""Counts of things, with their nouns."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return ``1 stage``, ``2 stages``, ``1,234 micro-batches``.

    Args:
        count: How many there are.
        noun: The noun in the singular; of several words, the last one takes the plural.
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"
