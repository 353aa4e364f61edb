"""The rules of packing, implemented slowly, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

documents = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=25), max_size=8)
groups_of_documents = st.lists(documents, min_size=1, max_size=3)


class Slot(NamedTuple):
    """A position in a sequence; the owner is a document, "padding" or "prefix"."""

    token: int
    owner: object
    labelled: bool = True


def pack_slowly(
    groups: Sequence[Sequence[Sequence[int]]],
    prefix: list[int],
    sequence_len: int,
    drop_tails: bool,
    max_sequences: int | None,
    padding_id: int,
) -> list[list[Slot]]:
    """Concatenate documents and slice them; a document's owner is (group number, number in the group)."""
    sequences: list[list[Slot]] = []
    for group_number, group in enumerate(groups):
        sequence = [Slot(token, "prefix") for token in prefix]
        for document_number, document in enumerate(group):
            for token in document:
                sequence.append(Slot(token, (group_number, document_number)))
                if len(sequence) == sequence_len:
                    sequences.append(sequence)
                    sequence = [Slot(token, "prefix") for token in prefix]
                    if drop_tails:
                        break
        if len(sequence) > len(prefix) and not drop_tails:
            sequences.append(sequence + [Slot(padding_id, "padding")] * (sequence_len - len(sequence)))
    return sequences[:max_sequences]


class Expected(NamedTuple):
    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    control_classes: list[int]


def label_slowly(
    sequence: list[Slot], isolate: bool, masked: set[int], classes: dict[object, int] | int = 1
) -> Expected:
    """Return the content of a training item; ``classes`` are control classes by owner, or one for all."""
    owners = [slot.owner for slot in sequence]
    first = next(owner for owner in owners if owner != "prefix")
    owners = [first if owner == "prefix" else owner for owner in owners]
    labels, positions, controls = [], [], []
    for here, owner in enumerate(owners):
        positions.append(positions[-1] + 1 if here and (not isolate or owner == owners[here - 1]) else 0)
        following = sequence[here + 1] if here + 1 < len(sequence) else None
        hidden = following is None or following.owner == "padding" or not following.labelled
        hidden = hidden or following.token in masked or (isolate and owners[here + 1] != owner)
        labels.append(-100 if hidden else following.token)
        unclassed = hidden or following.owner == "prefix"
        controls.append(0 if unclassed else classes if isinstance(classes, int) else classes[following.owner])
    return Expected([slot.token for slot in sequence], labels, positions, controls)


def flatten(groups: list[list[list[int]]]) -> tuple[list[list[int]], list[Any], np.ndarray]:
    """Return all documents, the indices of each group, and the lengths."""
    flat = [document for group in groups for document in group]
    ends = np.cumsum([len(group) for group in groups])
    indices = [np.arange(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    return flat, indices, np.array([len(document) for document in flat], np.int64)
