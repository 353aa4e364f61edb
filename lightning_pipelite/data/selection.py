"""Selects documents, splits off those for evaluation, and assigns control classes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_pipelite.data.packing import Ints


def choose_evaluation(digests: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Choose the documents to hold out.

    Documents with the same digest stay together, so that a text that occurs twice is never on both sides.

    Args:
        digests: Shape [documents], a keyed hash of each document's tokens; the key determines the choice.
        fraction: The share of documents to hold out, 0 <= fraction < 1.

    Returns:
        Shape [documents], true for held-out documents: none if the fraction is 0 or there are fewer than two different
        documents, otherwise at least one and never all.
    """
    values, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    picked = np.zeros(len(values), dtype=bool)
    if fraction > 0 and len(values) > 1:
        room = min(max(1, round(fraction * len(digests))), len(digests) - 1)
        for index, size in enumerate(sizes.tolist()):  # the order by digest is random
            if size <= room:
                picked[index] = True
                room -= size
            if room == 0:
                break
        if not picked.any():
            picked[np.argmin(sizes)] = True
    return picked[group.reshape(-1)]


def within_tokens(lengths: Ints, max_tokens: int | None) -> int:
    """Count the leading documents that fit as a whole into `max_tokens` tokens.

    Args:
        lengths: Shape [documents], the number of tokens of each, in the order in which they are taken.
        max_tokens: The limit; None for no limit.

    Returns:
        How many leading documents to take, up to the first that does not fit.
    """
    return len(lengths) if max_tokens is None else int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right"))


def class_of(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int8]:
    """Assign each document of control class 0 a class by its content.

    Args:
        digests: Shape [documents], a keyed hash of each document's tokens.

    Returns:
        Shape [documents], 1 or -1, about half each. The hash's lowest bit decides; `choose_evaluation` sorts by the
        highest.
    """
    return np.where(digests & np.uint64(1), 1, -1).astype(np.int8)


def within_weights(tokens: list[int], weights: list[float]) -> list[int]:
    """Apportion tokens to datasets by weight, with the largest total that they allow.

    Args:
        tokens: The number of tokens in each dataset.
        weights: Their weights, positive.

    Returns:
        How many tokens to take from each dataset: in proportion to the weights, and all tokens of at least one.
    """
    share = min(count / weight for count, weight in zip(tokens, weights, strict=True))
    return [min(count, round(share * weight)) for count, weight in zip(tokens, weights, strict=True)]
