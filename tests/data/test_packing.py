"""Packing against a slow function written from the rules, token by token."""

from __future__ import annotations

import errno
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipelite.data.corpus import UNLABELLED
from lightning_pipelite.data.packing import Layout, best_fit, lay_out
from lightning_pipelite.data.sequences import PackedSequences, write_sequences
from packing_reference import Slot, label_slowly, pack_slowly

PADDING = 999

documents = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=25), max_size=8)
groups_of_documents = st.lists(documents, min_size=1, max_size=3)


def flatten(groups: list[list[list[int]]]) -> tuple[list[list[int]], list[Any], np.ndarray]:
    """All documents, the indices of each group, and the lengths."""
    flat = [document for group in groups for document in group]
    ends = np.cumsum([len(group) for group in groups])
    indices = [np.arange(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    return flat, indices, np.array([len(document) for document in flat], np.int64)


def write(folder: Path, layout: Layout, flat: list[Any], classes: Any, room: int, prefix: list[int]) -> str:
    (folder / "scratch").write_bytes(b"".join(np.array(document, np.uint32).tobytes() for document in flat))
    lengths = np.array([len(document) for document in flat], np.int64)
    return write_sequences(
        folder / "packed.arrow",
        layout,
        folder / "scratch",
        np.cumsum(lengths) - lengths,
        np.asarray(classes, np.int8),
        sequence_len=len(prefix) + room,
        prefix=prefix,
        padding_id=PADDING,
    )


@settings(max_examples=150, deadline=None)
@given(
    groups=groups_of_documents,
    prefix=st.lists(st.integers(40, 42), max_size=3),
    room=st.integers(1, 9),
    drop_tails=st.booleans(),
    max_sequences=st.none() | st.integers(1, 6),
    isolate=st.booleans(),
    masked=st.sets(st.integers(0, 41), max_size=4),
    data=st.data(),
)
def test_packed_as_the_rules_say(
    groups: list[list[list[int]]],
    prefix: list[int],
    room: int,
    drop_tails: bool,
    max_sequences: int | None,
    isolate: bool,
    masked: set[int],
    data: Any,
) -> None:
    expected = pack_slowly(groups, prefix, len(prefix) + room, drop_tails, max_sequences, PADDING)
    flat, indices, lengths = flatten(groups)
    layout = lay_out(indices, lengths, room, drop_tails=drop_tails, max_sequences=max_sequences)
    classes = data.draw(st.lists(st.sampled_from([-1, 1]), min_size=len(flat), max_size=len(flat)))
    owners = [(g, d) for g, group in enumerate(groups) for d in range(len(group))]
    # Every third token is somebody's that the model is not to learn from.
    flagged = [[t | int(UNLABELLED) if (i + t) % 3 == 0 else t for i, t in enumerate(doc)] for doc in flat]
    place: Counter[object] = Counter()
    for sequence in expected:
        for number, slot in enumerate(sequence):
            if slot.owner not in ("prefix", "padding"):
                sequence[number] = slot._replace(labelled=(place[slot.owner] + slot.token) % 3 != 0)
                place[slot.owner] += 1

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), layout, flagged, classes, room, prefix)
        packed = PackedSequences(
            Path(folder) / "packed.arrow",
            isolate_documents=isolate,
            masked_ids=sorted(masked),
            padding_id=PADDING,
            prefix_len=len(prefix),
        )
        assert len(packed) == len(expected)
        for index, sequence in enumerate(expected):
            item = packed[index]
            wanted = label_slowly(sequence, isolate, masked, dict(zip(owners, classes, strict=True)))
            assert {name: values.tolist() for name, values in item.items()} == wanted._asdict()

    assert set(map(owners.__getitem__, layout.documents.tolist())) == set(place)
    assert int(layout.sizes.sum()) == sum(place.values())


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


def test_many_sequences_and_another_process(tmp_path: Path) -> None:
    """More than one batch of the file, read here and by a copy that another process would open."""
    flat = [list(range(number % 97, number % 97 + 50 + number % 60)) for number in range(4000)]
    lengths = np.array([len(document) for document in flat])
    layout = lay_out([np.arange(4000)], lengths, 64, drop_tails=False, max_sequences=None)
    first = write(tmp_path, layout, flat, np.ones(4000), 64, [])
    expected = pack_slowly([flat], [], 64, False, None, PADDING)
    packed = PackedSequences(
        tmp_path / "packed.arrow", isolate_documents=True, masked_ids=[], padding_id=PADDING, prefix_len=0
    )
    for reader in (packed, pickle.loads(pickle.dumps(packed))):
        assert len(reader) == len(expected) > 4096
        for index in range(0, len(expected), 41):
            wanted = label_slowly(expected[index], True, set())
            assert {name: values.tolist() for name, values in reader[index].items()} == wanted._asdict()
    flat[1234][7] += 1
    assert write(tmp_path, layout, flat, np.ones(4000), 64, []) != first


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    layout = lay_out([np.arange(1)], np.array([300_000]), 64, drop_tails=False, max_sequences=None)
    (tmp_path / "packed.arrow").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path, layout, [[1] * 300_000], [1], 64, [])
    assert caught.value.errno == errno.ENOSPC


def test_reference_by_hand() -> None:
    """The slow function itself, against what is worked out on paper."""
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
