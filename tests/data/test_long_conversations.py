"""Conversations that are longer than a sequence, and the parts that are made of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig, PackedDataModule
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
        assert "1 go on in the next sequence without their question" in told
        whole = expected(chat(system, *turns), tokenizer)[0]
        assert whole[:128] in texts
    else:
        assert "(2 parts made of them, each with its questions; 1 answer cut at the end)" in told
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
