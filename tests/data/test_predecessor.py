"""With isolation off, one source gives the token stream that qlora-pipe-lite's documented rules give.

The rules in its documentation: documents are shuffled, and whole ones are kept while they fit into max_tokens. The
suffix (EOS by default) follows each document. Sequences begin with the prefix (BOS by default) and are filled with
consecutive documents. With drop_tails, the rest of a document is dropped when a sequence is full. A last sequence that
is not full is not used. Masked tokens have label -100 and class 0; the prefix has class 0.

Its labels are its input ids, which the model shifts; here they are already shifted. Its shuffle differs, so the order
of the documents is taken from what was packed. The last, partial sequence is padded here, not dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data import PackedDataModule
from packed_files import BOS, EOS, items, write_jsonl

MakeData = Callable[..., PackedDataModule]
LENGTH = 64


def stream_of(
    documents: list[list[int]], prefix: list[int], *, drop_tails: bool, masked: set[int], control_class: int, most: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return the predecessor's sequences: input ids, labels (not shifted) and control classes."""
    sequences: list[tuple[list[int], list[int], list[int]]] = []
    sequence = [(token, 0) for token in prefix]
    for document in documents:
        rest = list(document)
        while rest:
            need = LENGTH - len(sequence)
            taken, rest = rest[:need], rest[need:]
            sequence += [(token, control_class) for token in taken]
            if len(sequence) == LENGTH:
                ids = [token for token, _ in sequence]
                sequences.append((
                    ids,
                    [-100 if token in masked else token for token in ids],
                    [0 if token in masked else c for token, c in sequence],
                ))  # fmt: skip
                sequence = [(token, 0) for token in prefix]
                if drop_tails:
                    rest = []
    return sequences[:most]


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no prefix": {"sequence_prefix": ""},
    "ids": {"sequence_prefix": [5, 6], "document_suffix": [7, 8]},
    "an id": {"sequence_prefix": 5, "document_suffix": 6},
    "text": {"sequence_prefix": "Once", "document_suffix": " the end", "document_prefix": "So "},
    "no suffix": {"document_suffix": ""},
    "special tokens masked": {"mask_tokens": True},
    "an id masked": {"mask_tokens": 260, "control_class": -1},
    "ids masked": {"mask_tokens": [260, 261, 0]},
    "drop_tails": {"drop_tails": True},
    "max_sequences": {"max_sequences": 7},
    "max_tokens": {"max_tokens": 2500},
}


@pytest.mark.parametrize("case", CASES)
def test_stream(
    tmp_path: Path, make_data: MakeData, texts: list[str], tokenizer: PreTrainedTokenizerFast, case: str
) -> None:
    options = dict(CASES[case])
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.control_class = options.pop("control_class", 1)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def spelt(value: Any, default: list[int]) -> list[int]:
        if value is None:
            return default
        return encode(value) if isinstance(value, str) else [value] if isinstance(value, int) else value

    suffix, before = options.get("document_suffix"), options.get("document_prefix", "")
    if isinstance(suffix, str):
        documents = [encode(before + text + suffix) for text in texts]
    else:
        documents = [encode(before + text) + spelt(suffix, [EOS]) for text in texts]
    prefix = spelt(options.get("sequence_prefix"), [BOS])
    mask = options.get("mask_tokens")
    masked = {BOS, EOS} if mask is True else {mask} if isinstance(mask, int) else set(mask or [])

    # The order depends on the seed alone, so it is taken from a packing of all documents.
    ordering = {name: options[name] for name in ("document_prefix", "document_suffix") if name in options}
    plain = make_data([source], eval_fraction=0, isolate_documents=False, sequence_prefix="", **ordering)
    plain.prepare_data()
    stream = [token for item in items(plain.train_dataloader()) for token in item["input_ids"]]
    order: list[list[int]] = []
    position = 0
    while len(order) < len(documents):
        order.append(max((d for d in documents if stream[position : position + len(d)] == d), key=len))
        position += len(order[-1])
    assert Counter(map(tuple, order)) == Counter(map(tuple, documents))
    assert order != documents

    if limit := options.pop("max_tokens", None):
        source.max_tokens = limit
        kept = 0
        while sum(map(len, order[: kept + 1])) <= limit:
            kept += 1
        assert 0 < kept < len(order)
        order = order[:kept]
    data = make_data([source], eval_fraction=0, isolate_documents=False, **options)
    data.prepare_data()
    packed = items(data.train_dataloader())
    expected = stream_of(
        order,
        prefix,
        drop_tails=options.get("drop_tails", False),
        masked=masked,
        control_class=source.control_class,
        most=options.get("max_sequences", 10**9),
    )
    assert len(packed) - len(expected) in (0, 1)
    for item, (ids, labels, classes) in zip(packed, expected, strict=False):
        assert item["input_ids"] == ids
        assert item["labels"] == [*labels[1:], -100]
        assert item["control_classes"] == [*classes[1:], 0]
        assert item["position_ids"] == list(range(LENGTH))
    if len(packed) > len(expected):  # the partial one holds the rest
        left = sum(map(len, order)) - len(expected) * (LENGTH - len(prefix))
        assert not options.get("drop_tails")
        rest = [token for document in order for token in document][-left:]
        assert packed[-1]["input_ids"] == [*prefix, *rest, *[EOS] * (LENGTH - len(prefix) - left)]
