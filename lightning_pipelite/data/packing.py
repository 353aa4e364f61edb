"""Which document goes to which side, and where in the packed sequences it lies: arithmetic on lengths alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def choose_evaluation(digests: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Choose the documents that are held out.

    Documents with the same digest stay together, so that a text that occurs twice is never on both sides.

    Args:
        digests: Shape [documents], a keyed hash of each document's tokens: its key decides who is chosen.
        fraction: The share of documents to hold out, 0 <= fraction < 1.

    Returns:
        Shape [documents], true where held out: none if the fraction is 0 or there are fewer than two different
        documents, else at least one and never all.
    """
    values, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    picked = np.zeros(len(values), dtype=bool)
    if fraction > 0 and len(values) > 1:
        room = min(max(1, round(fraction * len(digests))), len(digests) - 1)
        for index, size in enumerate(sizes.tolist()):  # sorted by digest is a random order
            if size <= room:
                picked[index] = True
                room -= size
            if room == 0:
                break
        if not picked.any():
            picked[np.argmin(sizes)] = True
    return picked[group.reshape(-1)]


def within_tokens(lengths: Ints, max_tokens: int | None) -> int:
    """Count the leading documents that fit, whole, into `max_tokens` tokens.

    Args:
        lengths: Shape [documents], tokens of each in the order in which they are taken.
        max_tokens: The limit; None for no limit.

    Returns:
        How many of the leading documents to take: the first that does not fit ends it.
    """
    return len(lengths) if max_tokens is None else int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right"))


@dataclass(frozen=True)
class Layout:
    """Where documents lie. All arrays have shape [documents] and list them in order of position.

    Positions count the slots of all sequences that hold document tokens: position p lies in sequence p // capacity.

    Attributes:
        documents: Index of each document.
        starts: Position of its first token.
        kept: How many of its leading tokens are packed, at least 1; without `drop_tails` and a limit, all.
        sequences: Number of sequences.
    """

    documents: Ints
    starts: Ints
    kept: Ints
    sequences: int


def lay_out(groups: list[Ints], lengths: Ints, capacity: int, *, drop_tails: bool, max_sequences: int | None) -> Layout:
    """Concatenate documents and slice them into sequences.

    Each group begins a fresh sequence. The last sequence of a group is usually partial: it stays, to be padded, unless
    `drop_tails`. With `drop_tails`, what a sequence has no room for is dropped with its document, so that every
    sequence begins with a fresh document.

    Args:
        groups: Per group the indices of its documents in order.
        lengths: Shape [all documents], tokens of each document by index, at least 1.
        capacity: Document tokens in a sequence.
        drop_tails: Whether documents are cut at the end of a sequence.
        max_sequences: Keep this many leading sequences; None for all.

    Returns:
        The layout.
    """
    starts, kept, sequences = [], [], 0
    for group in groups:
        sizes = _without_tails(lengths[group], capacity) if drop_tails else lengths[group]
        ends = np.cumsum(sizes)
        total = int(ends[-1]) if len(ends) else 0
        count = total // capacity if drop_tails else -(-total // capacity)
        starts.append(ends - sizes + sequences * capacity)
        sequences += count
        kept.append(np.clip(sequences * capacity - starts[-1], 0, sizes))
    if max_sequences is not None:
        sequences = min(sequences, max_sequences)

    start = np.concatenate(starts) if starts else np.empty(0, np.int64)
    keep = np.clip(sequences * capacity - start, 0, np.concatenate(kept) if kept else start)
    documents = np.concatenate(groups) if groups else start
    packed = keep > 0
    return Layout(documents[packed], start[packed], keep[packed], sequences)


def _without_tails(lengths: Ints, capacity: int) -> Ints:
    sizes = np.empty_like(lengths)
    room = capacity
    for index, length in enumerate(lengths.tolist()):
        sizes[index] = size = min(length, room)
        room = room - size or capacity
    return sizes
