"""Conversations that are longer than a sequence, and the parts they are split into."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.data.long_conversations import Cutter, Encoded, Long
from lightning_pipelite.data.records import Record
from people_files import chat, expected, lines, shared

LONG = [("human", "one two"), ("gpt", "three"), ("human", "four " * 9), ("gpt", "five " * 9), ("human", "so"),
        ("gpt", "six " * 99)]  # fmt: skip


@pytest.mark.parametrize("way", ["split", "drop", "keep"])
def test_long_conversations(
    make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path, way: str
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_dir)
    lines("a.jsonl", shared(LONG, system="Be."), shared([("human", "a"), ("gpt", "b")]))(tmp_path)
    data = make_data(
        [DatasetConfig(str(tmp_path / "a.jsonl"))], sequence_len=128, tokenizer_dir=str(chat_dir), eval_fraction=0,
        long_conversations=way,
    )  # fmt: skip
    (told,) = (line for line in data.summary() if line.startswith("dataset"))
    assert "1 conversation longer than 128 tokens" in told
    dataset = data.train_dataloader().dataset
    texts = []
    for index in range(len(dataset)):
        borders, length = dataset.borders(index)
        edges = [0, *borders.tolist(), length]
        ids = dataset[index]["input_ids"].tolist()
        texts += [ids[begin:end] for begin, end in itertools.pairwise(edges)]
    short = expected(chat(("user", "a"), ("assistant", "b")), tokenizer)[0]
    assert short in texts
    turns = [({"human": "user", "gpt": "assistant"}[who], words) for who, words in LONG]
    system = ("system", "Be.")
    if way == "drop":
        assert "(1 dropped)" in told
        assert texts == [short]
    elif way == "keep":
        assert "1 continue in the next sequence without their question" in told
        whole = expected(chat(system, *turns), tokenizer)[0]
        assert whole[:128] in texts
    else:
        assert "(split into 2 parts, each with its questions; 1 answer truncated)" in told
        first, second = chat(system, *turns[:4]), chat(system, *turns[4:])
        wanted = [short, expected(first, tokenizer)[0], expected(second, tokenizer)[0][:128]]
        assert sorted(texts) == sorted(wanted)


def test_parts_of_a_conversation_stay_on_one_side(
    make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path
) -> None:
    talks = [[(who, f"{name} {who} {number} " * 4) for number in range(6) for who in ("human", "gpt")]
             for name in "abcdefgh"]  # fmt: skip
    lines("a.jsonl", *map(shared, talks))(tmp_path)
    data = make_data(
        [DatasetConfig(str(tmp_path / "a.jsonl"))], sequence_len=128, tokenizer_dir=str(chat_dir), eval_fraction=0.3
    )
    sides = [data.train_dataloader(), data.val_dataloader()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_dir)
    names = [
        {name for item in side for name in re.findall(r"\b([a-h]) human", tokenizer.decode(item["input_ids"][0]))}
        for side in sides
    ]
    assert names[0] | names[1] == set("abcdefgh")
    assert not names[0] & names[1]


LIMIT = 6


class Letters:
    """Encodes letters as tokens: lower case for users, upper case for learnt replies, digits for other replies.

    "-" is the system's, "+" the developer's.
    """

    def encode_conversation(self, messages: list[dict[str, Any]], *_: object) -> Encoded:
        text = "".join(message["content"] for message in messages)
        return [ord(letter) for letter in text], np.array([letter.isupper() for letter in text], bool)


def message(letters: str) -> dict[str, Any]:
    role = {"-": "system", "+": "developer"}.get(letters, "user" if letters.islower() else "assistant")
    return {"role": role, "content": letters, **({"weight": 0} if letters.isdigit() else {})}


def cut(way: Any, *messages: str) -> tuple[list[str], Long]:
    counts = Long()
    record = Record([message(letters) for letters in messages], "here")
    encoded = Cutter(Letters(), LIMIT, way).encode(record, set(), counts)  # type: ignore[arg-type]
    for ids, flags in encoded:
        assert flags.tolist() == [chr(token).isupper() for token in ids]
    return ["".join(map(chr, ids)) for ids, _ in encoded], counts


@pytest.mark.parametrize(
    ("talk", "parts", "counts"),
    [
        ("aaa BBB", ["aaaBBB"], {}),
        ("aa BB cc DD", ["aaBB", "ccDD"], {"parts": 2}),
        ("- a B c D e F", ["-aB", "-cDeF"], {"parts": 2}),  # the last part has as much context as fits
        ("+ a B c D e F", ["+aB", "+cDeF"], {"parts": 2}),
        ("aa BBBBB", ["aaBBBB"], {"parts": 1, "cut": 1}),
        ("aaaaa BB", ["aaaaaB"], {"parts": 1, "cut": 1}),
        ("aaaaaa B", [], {"unanswered": 1}),
        ("aaaaaa B cccccc D e F", ["eF"], {"parts": 1, "unanswered": 2}),
        ("aa BBBBB c D", ["aaBBBB", "cD"], {"parts": 2, "cut": 1}),
        ("a B cc DDDDD", ["aB", "ccDDDD"], {"parts": 2, "cut": 1}),
        # Turns with nothing to learn stay with the turn that they lead to or follow if there is room, else are dropped.
        ("aaa BBB c D e 1", ["aaaBBB", "cDe1"], {"parts": 2}),
        ("a BBBB c 1111", ["aBBBB"], {"parts": 1}),
        ("aaa BBB c 1 d 1", ["aaaBBB"], {"parts": 1}),
        ("a 11111 bb BBB", ["bbBBB"], {"parts": 1}),
        ("a 1 b 1 cc CCCC", ["ccCCCC"], {"parts": 1}),
        ("a 1111 b 1111", [], {}),
        ("- 111 aa BBB", ["-aaBBB"], {"parts": 1}),
        ("- 1 a B cc DDD", ["-1aB", "-ccDDD"], {"parts": 2}),
    ],
)
def test_where_it_is_cut(talk: str, parts: list[str], counts: dict[str, int]) -> None:
    found, told = cut("split", *talk.split())
    assert found == parts
    long = {"limit": LIMIT, "conversations": 1} if len(talk.replace(" ", "")) > LIMIT else {}
    assert told == Long(**long, **counts)


def test_dropped_and_kept() -> None:
    assert cut("drop", "aaaa", "BBB") == ([], Long(limit=LIMIT, conversations=1, dropped=1))
    assert cut("keep", "aaaa", "BBB") == (["aaaaBBB"], Long(limit=LIMIT, conversations=1, kept=1))
    assert cut("drop", "aaa", "BBB") == cut("keep", "aaa", "BBB") == (["aaaBBB"], Long())


def test_counts_of_several_files() -> None:
    counts = Long(5, 1, 2, 3, 4, 5, 6)
    counts.add(Long(7, 10, 20, 30, 40, 50, 60))
    counts.add(Long(0, 100, 200, 300, 400, 500, 600))
    assert counts == Long(7, 111, 222, 333, 444, 555, 666)
