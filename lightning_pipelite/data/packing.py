"""Where each document lies in the packed sequences: arithmetic on lengths alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Where documents lie, in segments. All arrays have shape [segments] and list them in order of position.

    A segment is a run of one document's tokens in one sequence. Positions count the slots of all sequences that hold
    document tokens: position p lies in sequence p // capacity.

    Attributes:
        documents: Index of each segment's document.
        sources: Which of the document's tokens is its first.
        starts: Position of its first token.
        sizes: Its tokens, at least 1.
        sequences: Number of sequences.
    """

    documents: Ints
    sources: Ints
    starts: Ints
    sizes: Ints
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
    """Put documents into sequences so that none that fits into a sequence is split.

    Best-fit decreasing: the longest first, each into the fullest sequence that has room for it. A document that is
    longer than a sequence fills sequences of its own, and its rest is placed like a document. No sequence holds
    documents of two groups.

    Args:
        groups: Per group the indices of its documents.
        lengths: Shape [all documents], tokens of each document by index, at least 1.
        capacity: Document tokens in a sequence.
        max_sequences: Keep this many sequences, taken at random; None for all.
        seed: Of the sequences' order.

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
    # In the order of placement the first sequences hold the longest documents.
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
    """Give each size, in this order, its position, and the number of sequences."""
    positions = np.empty_like(sizes)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room: sequences
    rooms = 0  # bit r is set where with_room[r] is not empty
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
