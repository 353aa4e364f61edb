"""Packing against a slow function written from the rules, token by token."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_reference import label_slowly, pack_slowly

from lightning_pipelite.data.packing import choose_evaluation, lay_out, within_tokens
from lightning_pipelite.data.sequences import PackedSequences, write_sequences

PADDING = 999

documents = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=25), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    groups=st.lists(documents, min_size=1, max_size=3),
    prefix=st.lists(st.integers(40, 42), max_size=3),
    room=st.integers(1, 9),
    drop_tails=st.booleans(),
    max_sequences=st.none() | st.integers(1, 6),
    isolate=st.booleans(),
    masked=st.sets(st.integers(0, 41), max_size=4),
)
def test_packed_as_the_rules_say(
    groups: list[list[list[int]]],
    prefix: list[int],
    room: int,
    drop_tails: bool,
    max_sequences: int | None,
    isolate: bool,
    masked: set[int],
) -> None:
    sequence_len = len(prefix) + room
    expected = pack_slowly(groups, prefix, sequence_len, drop_tails, max_sequences, PADDING)

    flat = [document for group in groups for document in group]
    lengths = np.array([len(document) for document in flat], np.int64)
    ends = np.cumsum([len(group) for group in groups])
    indices = [np.arange(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    layout = lay_out(indices, lengths, room, drop_tails=drop_tails, max_sequences=max_sequences)
    tokens = np.array([token for document in flat for token in document], np.uint32)
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(
            Path(folder),
            layout,
            tokens,
            np.cumsum(lengths) - lengths,
            sequence_len=sequence_len,
            prefix=prefix,
            padding_id=PADDING,
        )
        packed = PackedSequences(Path(folder), isolate_documents=isolate, masked_ids=sorted(masked), padding_id=PADDING)
        assert len(packed) == len(expected)
        for item, sequence in zip((packed[i] for i in range(len(packed))), expected, strict=True):
            input_ids, labels, position_ids = label_slowly(sequence, isolate, masked)
            assert item["input_ids"].tolist() == input_ids
            assert item["labels"].tolist() == labels
            assert item["position_ids"].tolist() == position_ids

    owners = {owner for sequence in expected for _, owner in sequence} - {"prefix", "padding"}
    kept = sum(owner not in ("prefix", "padding") for sequence in expected for _, owner in sequence)
    assert (len(layout.documents), int(layout.kept.sum())) == (len(owners), kept)


@given(digests=st.lists(st.integers(0, 12), max_size=40), fraction=st.floats(0, 1, exclude_max=True, allow_nan=False))
def test_evaluation_share(digests: list[int], fraction: float) -> None:
    held_out = choose_evaluation(np.array(digests, np.uint64), fraction)
    inside = {digest for digest, out in zip(digests, held_out, strict=True) if out}
    outside = {digest for digest, out in zip(digests, held_out, strict=True) if not out}
    assert not inside & outside
    if fraction == 0 or len(set(digests)) < 2:
        assert not inside
    else:
        assert inside
        assert outside


def test_evaluation_share_is_exact_where_documents_differ() -> None:
    digests = np.arange(1000, dtype=np.uint64)
    assert choose_evaluation(digests, 0.25).sum() == 250
    assert choose_evaluation(digests, 1e-6).sum() == 1
    assert choose_evaluation(digests, 0.9999).sum() == 999


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (1, 0), (4, 0), (5, 1), (8, 2), (9, 2), (100, 4)])
def test_within_tokens_takes_whole_documents(limit: int | None, count: int) -> None:
    assert within_tokens(np.array([5, 3, 4, 1]), limit) == count
