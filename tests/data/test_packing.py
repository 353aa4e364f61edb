"""Packing matches a slow reference that follows the rules token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipelite.data.packing import best_fit, lay_out
from packing_reference import Slot, flatten, groups_of_documents, label_slowly, pack_slowly

PADDING = 999


@settings(max_examples=150, deadline=None)
@given(
    groups=groups_of_documents,
    room=st.integers(1, 12),
    drop_tails=st.booleans(),
    max_sequences=st.none() | st.integers(1, 6),
)
def test_concatenated_as_the_rules_say(
    groups: list[list[list[int]]], room: int, drop_tails: bool, max_sequences: int | None
) -> None:
    flat, indices, lengths = flatten(groups)
    layout = lay_out(indices, lengths, room, drop_tails=drop_tails, max_sequences=max_sequences)
    tokens = np.full(layout.sequences * room, PADDING)
    for document, source, start, size in zip(
        layout.documents, layout.sources, layout.starts, layout.sizes, strict=True
    ):
        assert size > 0
        assert (tokens[start : start + size] == PADDING).all()
        assert start // room == (start + size - 1) // room
        tokens[start : start + size] = flat[document][source : source + size]
    ends = layout.starts + layout.sizes
    assert (ends <= [*layout.starts[1:], layout.sequences * room]).all()
    expected = pack_slowly(groups, [], room, drop_tails, max_sequences, PADDING)
    assert tokens.tolist() == [slot.token for sequence in expected for slot in sequence]


@settings(max_examples=150, deadline=None)
@given(
    groups=groups_of_documents,
    room=st.integers(1, 12),
    max_sequences=st.none() | st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_best_fit_splits_nothing_that_fits(
    groups: list[list[list[int]]], room: int, max_sequences: int | None, seed: int
) -> None:
    flat, indices, lengths = flatten(groups)
    layout = best_fit(indices, lengths, room, max_sequences=max_sequences, seed=seed)
    whole = best_fit(indices, lengths, room, max_sequences=None, seed=seed)
    assert layout.sequences == min(whole.sequences, max_sequences or whole.sequences)
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])

    rows: dict[int, list[tuple[int, int, int, int]]] = {}
    for document, source, start, size in zip(
        layout.documents, layout.sources, layout.starts, layout.sizes, strict=True
    ):
        rows.setdefault(int(start) // room, []).append((int(start) % room, int(document), int(source), int(size)))
    assert sorted(rows) == list(range(layout.sequences))
    for pieces in rows.values():
        assert [slot for slot, *_ in pieces] == [0, *np.cumsum([size for *_, size in pieces])[:-1]]
        assert sum(size for *_, size in pieces) <= room
        assert len({group_of[document] for _, document, *_ in pieces}) == 1

    pieces_of: dict[int, list[tuple[int, int]]] = {}
    for document, source, size in zip(whole.documents, whole.sources, whole.sizes, strict=True):
        pieces_of.setdefault(int(document), []).append((int(source), int(size)))
    assert sorted(pieces_of) == list(range(len(flat)))
    for document, pieces in pieces_of.items():
        assert sorted(pieces) == [
            (begin, min(room, len(flat[document]) - begin)) for begin in range(0, len(flat[document]), room)
        ]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), room=st.integers(50, 110))
def test_best_fit_is_best_fit_decreasing(lengths: list[int], room: int) -> None:
    rooms: list[int] = []  # by the rule: the longest first, each into the fullest sequence that has room for it
    pieces = [min(room, length - begin) for length in lengths for begin in range(0, length, room)]
    for size in sorted(pieces, reverse=True):
        fitting = [number for number, left in enumerate(rooms) if left >= size]
        if not fitting:
            fitting, rooms = [len(rooms)], [*rooms, room]
        rooms[min(fitting, key=rooms.__getitem__)] -= size
    layout = best_fit([np.arange(len(lengths))], np.array(lengths), room, max_sequences=None, seed=0)
    assert layout.sequences == len(rooms)
    filled = np.bincount(layout.starts // room, weights=layout.sizes)
    assert sorted(room - filled) == sorted(rooms)


def test_best_fit_depends_on_lengths_and_seed_alone() -> None:
    """Of equal lengths the first is placed first, of equal rooms the last is filled; the seed orders the sequences."""
    lengths, count = np.array([4, 3] * 30), 30
    layout = best_fit([np.arange(60)], lengths, 7, max_sequences=None, seed=5)
    places = np.random.default_rng((5, count)).permutation(count)
    expected = np.empty(60, np.int64)
    expected[0::2], expected[1::2] = places * 7, places[::-1] * 7 + 4
    assert layout.starts[np.argsort(layout.documents)].tolist() == expected.tolist()


def test_reference_by_hand() -> None:
    """The slow reference itself matches results worked out on paper."""
    sequence = pack_slowly([[[5, 6, 7], [8, 9]]], [1], 5, False, None, 0)
    assert [[slot.token for slot in row] for row in sequence] == [[1, 5, 6, 7, 8], [1, 9, 0, 0, 0]]
    assert label_slowly(sequence[0], True, {6}, {(0, 0): -1, (0, 1): 1}) == (
        [1, 5, 6, 7, 8],
        [5, -100, 7, -100, -100],
        [0, 1, 2, 3, 0],
        [-1, 0, -1, 0, 0],
    )
    assert label_slowly(sequence[0], False, set(), {(0, 0): -1, (0, 1): 1}) == (
        [1, 5, 6, 7, 8],
        [5, 6, 7, 8, -100],
        [0, 1, 2, 3, 4],
        [-1, -1, -1, 1, 0],
    )
    assert label_slowly([Slot(1, "prefix"), Slot(2, "a", False), Slot(3, "a")], True, set(), 1) == (
        [1, 2, 3],
        [-100, 3, -100],
        [0, 1, 2],
        [0, 1, 0],
    )
