"""Computes where each document goes in the packed sequences, from the documents' lengths alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The positions of documents, as segments. All arrays have shape [segments] and are sorted by position.

    A segment is a run of one document's tokens in one sequence. Positions count only the slots for document tokens,
    over all sequences: position p is in sequence p // capacity.

    Attributes:
        documents: Index of each segment's document.
        sources: Offset of the segment within its document, in tokens.
        starts: Position of the segment's first token.
        sizes: Number of tokens, at least 1.
        sequences: Number of sequences.
    """

    documents: Ints
    sources: Ints
    starts: Ints
    sizes: Ints
    sequences: int


def lay_out(groups: list[Ints], lengths: Ints, capacity: int, *, drop_tails: bool, max_sequences: int | None) -> Layout:
    """Concatenate documents and slice them into sequences.

    Each group begins a new sequence. The last sequence of a group is usually partial; it is kept, to be padded, unless
    `drop_tails` is set. With `drop_tails`, the rest of a document that does not fit into its sequence is dropped, so
    that every sequence begins with a new document.

    Args:
        groups: For each group, the indices of its documents in order.
        lengths: Shape [all documents], the number of tokens of each document, at least 1.
        capacity: Document tokens per sequence.
        drop_tails: Whether documents are cut off at the end of a sequence.
        max_sequences: Keep at most this many leading sequences; None for all.

    Returns:
        The layout.
    """
    empty = np.empty(0, np.int64)
    starts, kept, sequences = [empty], [empty], 0
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

    start = np.concatenate(starts)
    keep = np.clip(sequences * capacity - start, 0, np.concatenate(kept))
    packed = keep > 0
    documents = np.concatenate([empty, *groups])[packed]
    return _sliced(documents, start[packed], start[packed] + keep[packed], capacity, sequences)


def _sliced(documents: Ints, starts: Ints, ends: Ints, capacity: int, sequences: int) -> Layout:
    first = starts // capacity
    pieces = (ends - 1) // capacity - first + 1
    owner = np.repeat(np.arange(len(documents)), pieces)
    sequence = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.maximum(starts[owner], sequence * capacity)
    end = np.minimum(ends[owner], (sequence + 1) * capacity)
    return Layout(documents[owner], begin - starts[owner], begin, end - begin, sequences)


def _without_tails(lengths: Ints, capacity: int) -> Ints:
    sizes = np.empty_like(lengths)
    room = capacity
    for index, length in enumerate(lengths.tolist()):
        sizes[index] = size = min(length, room)
        room = room - size or capacity
    return sizes


def best_fit(groups: list[Ints], lengths: Ints, capacity: int, *, max_sequences: int | None, seed: int) -> Layout:
    """Pack documents into sequences without splitting any that fits into a sequence.

    Best-fit decreasing: the longest first, each into the fullest sequence that has room for it. A document that is
    longer than a sequence fills whole sequences, and the remainder is placed like a document of its own. No sequence
    mixes documents of two groups.

    Args:
        groups: For each group, the indices of its documents.
        lengths: Shape [all documents], the number of tokens of each document, at least 1.
        capacity: Document tokens per sequence.
        max_sequences: Keep at most this many sequences, chosen at random; None for all.
        seed: Seed for the order of the sequences.

    Returns:
        The layout.
    """
    empty = np.empty(0, np.int64)
    documents, sources, starts, sizes, sequences = [empty], [empty], [empty], [empty], 0
    for group in groups:
        pieces = -(-lengths[group] // capacity)
        owner = np.repeat(group, pieces)
        source = capacity * (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        size = np.minimum(lengths[owner] - source, capacity)
        order = np.argsort(-size, kind="stable")
        position, count = _fit(size[order], capacity)
        documents.append(owner[order])
        sources.append(source[order])
        sizes.append(size[order])
        starts.append(position + sequences * capacity)
        sequences += count

    start = np.concatenate(starts)
    # Shuffled, because in order of placement the first sequences hold the longest documents.
    place = np.random.default_rng((seed, sequences)).permutation(sequences)
    start = place[start // capacity] * capacity + start % capacity
    if max_sequences is not None:
        sequences = min(sequences, max_sequences)
    order = np.argsort(start, kind="stable")
    order = order[start[order] < sequences * capacity]
    return Layout(
        np.concatenate(documents)[order],
        np.concatenate(sources)[order],
        start[order],
        np.concatenate(sizes)[order],
        sequences,
    )


def _fit(sizes: Ints, capacity: int) -> tuple[Ints, int]:
    """Place the sizes in this order; return the position of each, and the number of sequences."""
    positions = np.empty_like(sizes)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # sequences, indexed by their free positions
    rooms = 0  # bit r is set if with_room[r] is not empty
    count = 0
    for index, size in enumerate(sizes.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, sequence = capacity, count
            count += 1
        positions[index] = sequence * capacity + capacity - room
        if room > size:
            with_room[room - size].append(sequence)
            rooms |= 1 << (room - size)
    return positions, count
