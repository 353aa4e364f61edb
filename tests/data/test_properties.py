"""Random documents and options, from files to micro-batches: what is packed is what was given.

Documents end with a suffix token that no text contains, and padding is another such token. Documents can therefore be
recognised in the packed sequences without the package's own records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig, PackedDataModule
from packed_files import EOS, items, write_jsonl
from packing_reference import Slot, label_slowly

END = 1  # <s>, which no text contains
WIDTH = 64
MakeData = Callable[..., PackedDataModule]

texts_of = st.lists(st.text("ab cé", min_size=1, max_size=150), min_size=1, max_size=12)
options_of = st.fixed_dictionaries(
    {
        "packing": st.sampled_from([None, "concatenate", "best_fit"]),
        "mix_datasets": st.booleans(),
        "sequence_prefix": st.sampled_from(["", 7, [8, 9, 10], "ab"]),
        "document_prefix": st.sampled_from([None, "", "c b", 11, [12, 13]]),
        "mask_tokens": st.sampled_from([None, True, END, [END, 7, 11]]),
        "eval_fraction": st.sampled_from([0.0, 0.1, 0.5]),
        "isolate_documents": st.booleans(),
        "seed": st.integers(0, 3),
    }
)


class Documents:
    """The documents of some sources, tokenised as the options require, without the package."""

    def __init__(self, tokenizer: Any, sources: list[list[str]], classes: list[int], options: dict[str, Any]) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        before = options["document_prefix"]
        text_before = before if isinstance(before, str) else ""
        ids_before = [before] if isinstance(before, int) else before if isinstance(before, list) else []
        prefix = options["sequence_prefix"]
        self.prefix = encode(prefix) if isinstance(prefix, str) else [prefix] if isinstance(prefix, int) else prefix
        self.room = WIDTH - len(self.prefix)
        self.classes: dict[tuple[int, ...], set[int]] = {}
        self.all: Counter[tuple[int, ...]] = Counter()
        for texts, control_class in zip(sources, classes, strict=True):
            for text in texts:
                document = (*ids_before, *encode(text_before + text), END)
                self.all[document] += 1
                self.classes.setdefault(document, set()).update([control_class] if control_class else [-1, 1])
        mask = options["mask_tokens"]
        self.masked = {0, 1} if mask is True else {mask} if isinstance(mask, int) else set(mask or [])

    def split(self, document: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the pieces into which best-fit packing cuts a document."""
        return [document[begin : begin + self.room] for begin in range(0, len(document), self.room)]

    def pieces(self, row: list[int]) -> list[tuple[int, ...]]:
        """Cut a sequence's ids, without prefix and padding, after the end of each document."""
        assert row[: len(self.prefix)] == self.prefix
        body = row[len(self.prefix) :]
        while body and body[-1] == EOS:
            body = body[:-1]
        assert EOS not in body
        found: list[tuple[int, ...]] = []
        begin = 0
        for number, token in enumerate(body, start=1):
            if token == END or number == len(body):
                found.append(tuple(body[begin:number]))
                begin = number
        return found


def check_row(documents: Documents, item: dict[str, list[int]], owners: list[Any], isolate: bool) -> None:
    """Check ids, labels, positions and classes of a sequence, by the document that each of its pieces belongs to."""
    pieces = documents.pieces(item["input_ids"])
    slots = [Slot(token, "prefix") for token in documents.prefix]
    classes: dict[object, int] = {}
    for number, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
        begin = len(slots)
        slots += [Slot(token, number) for token in piece]
        seen = {item["control_classes"][t - 1] for t in range(max(1, begin), len(slots))} - {0}
        assert len(seen) <= 1  # one class for a whole document
        assert seen <= documents.classes[owner]
        classes[number] = seen.pop() if seen else 1
    slots += [Slot(EOS, "padding")] * (WIDTH - len(slots))
    assert item == label_slowly(slots, isolate, documents.masked, classes)._asdict()


def owners_in_a_row(documents: Documents, sequences: list[dict[str, list[int]]]) -> list[list[tuple[int, ...]]]:
    """Follow documents from one sequence to the next, and return the document of each piece."""
    owners: list[list[tuple[int, ...]]] = []
    pending: list[tuple[int, int]] = []  # where the pieces of the current document are
    present: tuple[int, ...] = ()
    for number, item in enumerate(sequences):
        owners.append([])
        for piece in documents.pieces(item["input_ids"]):
            pending.append((number, len(owners[-1])))
            owners[-1].append(())
            present += piece
            if piece[-1] == END:
                assert present in documents.all
                for row, place in pending:
                    owners[row][place] = present
                pending, present = [], ()
    assert not pending
    return owners


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(texts_of, min_size=1, max_size=3),
    options=options_of,
    classes=st.lists(st.sampled_from([-1, 0, 1]), min_size=3, max_size=3),
)
def test_every_token_once_in_order_and_right_at_each_border(
    tmp_path: Path,
    make_data: MakeData,
    tokenizer: PreTrainedTokenizerFast,
    sources: list[list[str]],
    options: dict[str, Any],
    classes: list[int],
) -> None:
    classes = classes[: len(sources)]
    documents = Documents(tokenizer, sources, classes, options)
    datasets = [write_jsonl(tmp_path / f"{number}.jsonl", texts) for number, texts in enumerate(sources)]
    for dataset, control_class in zip(datasets, classes, strict=True):
        dataset.control_class = control_class  # type: ignore[assignment]
    data = make_data(datasets, document_suffix=END, **options)
    data.prepare_data()
    sides = [items(data.train_dataloader()), items(data.val_dataloader())]
    found: list[Counter[tuple[int, ...]]] = []
    for side in sides:
        if options["packing"] == "best_fit":
            counted: Counter[tuple[int, ...]] = Counter()
            owners: list[list[tuple[int, ...]]] = []
            for item in side:
                owners.append([])
                for piece in documents.pieces(item["input_ids"]):
                    # A document that fits stays whole; a longer one is cut at multiples of the room.
                    homes = [
                        document
                        for document in documents.all
                        if any(
                            piece == document[b : b + documents.room] for b in range(0, len(document), documents.room)
                        )
                    ]
                    assert homes
                    counted[piece] += 1
                    owners[-1].append(homes[0])
                    if len(homes) > 1:  # it may be any of them: allow all their classes
                        documents.classes[homes[0]] |= set().union(*(documents.classes[home] for home in homes))
            found.append(counted)
        else:
            owners = owners_in_a_row(documents, side)
            ends = [
                owner
                for item, row in zip(side, owners, strict=True)
                for piece, owner in zip(documents.pieces(item["input_ids"]), row, strict=True)
                if piece[-1] == END
            ]
            found.append(Counter(ends))
        for item, row in zip(side, owners, strict=True):
            check_row(documents, item, row, options["isolate_documents"])
    wanted = documents.all
    if options["packing"] == "best_fit":
        wanted = Counter()
        for document, count in documents.all.items():
            for piece in documents.split(document):
                wanted[piece] += count
    assert found[0] + found[1] == wanted
    heads = [{document for document in side if document in documents.all} for side in found]
    assert not heads[0] & heads[1]
    if options["eval_fraction"] and len(documents.all) > 1:
        assert sides[1]
    else:
        assert not sides[1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("ab cé", min_size=1, max_size=300), min_size=6, max_size=20), limit=st.none() | st.just(2)
)
def test_what_an_option_drops(
    tmp_path: Path, make_data: MakeData, tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int | None
) -> None:
    """With drop_tails, each sequence begins with a document, and only the last document in it may lack its tail."""
    options = {"document_prefix": None, "sequence_prefix": 7, "mask_tokens": None}
    documents = Documents(tokenizer, [texts], [1], options)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    data = make_data(
        [source], document_suffix=END, eval_fraction=0, drop_tails=True, max_sequences=limit, sequence_prefix=7
    )
    data.prepare_data()
    side = items(data.train_dataloader())
    assert limit is None or len(side) <= limit
    whole: Counter[tuple[int, ...]] = Counter()
    for item in side:
        *complete, last = documents.pieces(item["input_ids"])
        assert sum(map(len, complete)) + len(last) == documents.room  # no padding
        whole.update(complete)
        homes = [document for document in documents.all if document[: len(last)] == last]
        assert homes
        check_row(documents, item, [*complete, homes[0]], True)
    assert whole <= documents.all
    assert data.statistics is not None
    assert data.statistics.train.tokens == documents.room * len(side)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_class_zero_is_either_and_always_the_same(
    tmp_path: Path, make_data: MakeData, texts: list[str], packing: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"{number} {text[:30]}" for number in range(5) for text in texts])
    source = DatasetConfig(str(tmp_path / "a.jsonl"), control_class=0)

    def classes(**options: Any) -> dict[tuple[int, ...], int]:
        data = make_data([source], eval_fraction=0, sequence_len=512, **options)
        data.prepare_data()
        found = {}
        for item in items(data.train_dataloader()):
            begin = 1
            for end, token in enumerate(item["input_ids"], start=1):
                if token == EOS and end - begin > 1:
                    (found[tuple(item["input_ids"][begin:end])],) = set(item["control_classes"][begin : end - 1])
                if token == EOS:
                    begin = end
        return found

    one = classes(packing=packing)
    assert set(one.values()) == {-1, 1}
    assert abs(sum(one.values())) < 0.2 * len(one)
    other = classes(packing=packing, mix_datasets=True)
    whole = [document for document in one if document in other]
    assert len(whole) > 200
    assert all(one[document] == other[document] for document in whole)
