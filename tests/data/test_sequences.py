"""Sequences packed to and read from disk match a slow reference that follows the rules token by token."""

from __future__ import annotations

import errno
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipelite.data.corpus import UNLABELLED
from lightning_pipelite.data.packing import Layout, lay_out
from lightning_pipelite.data.sequence_file import write_sequences
from lightning_pipelite.data.sequences import PackedSequences
from packing_reference import flatten, groups_of_documents, label_slowly, pack_slowly

PADDING = 999


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
    # Every third token is not to be learnt, like the words of a user.
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


def test_many_sequences_and_another_process(tmp_path: Path) -> None:
    """The file has more than one batch, and is also read by a pickled copy, as another process would."""
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


def small(folder: Path, flat: list[list[int]], room: int) -> PackedSequences:
    """Pack each document in a separate group, and so in separate sequences."""
    layout = lay_out(
        [np.array([number]) for number in range(len(flat))],
        np.array([len(document) for document in flat]),
        room,
        drop_tails=False,
        max_sequences=None,
    )
    write(folder, layout, flat, np.ones(len(flat)), room, [])
    return PackedSequences(
        folder / "packed.arrow", isolate_documents=True, masked_ids=[], padding_id=PADDING, prefix_len=0
    )


def test_the_empty_item_and_the_types_of_all(tmp_path: Path) -> None:
    packed = small(tmp_path, [[5, 6, 7]], 4)
    assert {name: values.tolist() for name, values in packed[None].items()} == {
        "input_ids": [PADDING] * 4, "labels": [-100] * 4, "position_ids": [0, 1, 2, 3], "control_classes": [0] * 4,
    }  # fmt: skip
    assert {values.dtype for item in (packed[None], packed[0]) for values in item.values()} == {torch.int64}


def test_tokens_that_stand_nowhere(tmp_path: Path) -> None:
    """A token counts as present in any batch of the file, also where it is not learnt."""
    first = [[20, 21, 22 | int(UNLABELLED)], *([[20]] * 5000), [23]]
    packed = small(tmp_path, first, 3)
    assert len(packed) > 4096
    asked = {20, 21, 22, 23, 24, 1 << 20}
    assert packed.without(asked) == {24, 1 << 20}
    assert asked == {20, 21, 22, 23, 24, 1 << 20}
    assert packed.without(set()) == set()
    assert packed.without({20, PADDING}) == set()


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    layout = lay_out([np.arange(1)], np.array([300_000]), 64, drop_tails=False, max_sequences=None)
    (tmp_path / "packed.arrow").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path, layout, [[1] * 300_000], [1], 64, [])
    assert caught.value.errno == errno.ENOSPC
