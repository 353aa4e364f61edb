"""The rules of packing, written down slowly, token by token."""

from __future__ import annotations


def pack_slowly(
    groups: list[list[list[int]]],
    prefix: list[int],
    sequence_len: int,
    drop_tails: bool,
    max_sequences: int | None,
    padding_id: int,
) -> list[list[tuple[int, object]]]:
    """Pack lists of documents: sequences of (token, owner); padding is owned by "padding", a prefix by "prefix"."""
    sequences: list[list[tuple[int, object]]] = []
    for group_number, group in enumerate(groups):
        sequence: list[tuple[int, object]] = [(token, "prefix") for token in prefix]
        for document_number, document in enumerate(group):
            for token in document:
                sequence.append((token, (group_number, document_number)))
                if len(sequence) == sequence_len:
                    sequences.append(sequence)
                    sequence = [(token, "prefix") for token in prefix]
                    if drop_tails:
                        break
        if len(sequence) > len(prefix) and not drop_tails:
            sequences.append(sequence + [(padding_id, "padding")] * (sequence_len - len(sequence)))
    return sequences[:max_sequences]


def label_slowly(
    sequence: list[tuple[int, object]], isolate: bool, masked: set[int]
) -> tuple[list[int], list[int], list[int]]:
    """Give input_ids, labels and position_ids of a sequence of (token, owner)."""
    owners = [owner for _, owner in sequence]
    first = next(owner for owner in owners if owner != "prefix")
    owners = [first if owner == "prefix" else owner for owner in owners]
    labels, positions = [], []
    for here, (_, owner) in enumerate(zip(sequence, owners, strict=True)):
        positions.append(positions[-1] + 1 if here and (not isolate or owner == owners[here - 1]) else 0)
        unseen = here + 1 == len(sequence) or owners[here + 1] == "padding"
        hidden = unseen or (isolate and owners[here + 1] != owner) or sequence[here + 1][0] in masked
        labels.append(-100 if hidden else sequence[here + 1][0])
    return [token for token, _ in sequence], labels, positions
