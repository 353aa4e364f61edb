"""Data files as users have them, and conversations in ChatML by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig

Write = Callable[[Path], Any]
Part = tuple[str, bool]  # a piece of text, and whether it is trained on


@dataclass
class Case:
    """Data files as users have them.

    Args:
        write: Writes them into a folder.
        says: The line that reports the data found, without the path; if it is refused, a pattern of the error.
        parts: The document that is packed from them; empty if they are refused.
        path: Path in the folder; by default, the only thing in it.
        options: Options of the dataset.
        module: Options of the data module.
        others: Further documents that are packed with the first, in any order.
    """

    write: Write
    says: str
    parts: list[Part] = field(default_factory=list)
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    others: list[list[Part]] = field(default_factory=list)

    def dataset(self, folder: Path) -> DatasetConfig:
        """Write the files into a new folder, and return a dataset of them."""
        folder.mkdir()
        self.write(folder)
        return DatasetConfig(str(folder / (self.path or next(folder.iterdir()).name)), **self.options)


TALKS = "loss on the assistant's turns"
QUESTION, ANSWER = "Who was it?", "It was the cat."


def chat(*messages: tuple[str, str], learnt: tuple[int, ...] = ()) -> list[Part]:
    """Render ChatML by hand; all replies are trained on unless `learnt` selects some by number."""
    parts: list[Part] = []
    for number, (role, content) in enumerate(messages):
        parts.append((f"<|im_start|>{role}\n", False))
        parts.append((f"{content}<|im_end|>\n", role == "assistant" and (not learnt or number in learnt)))
    return parts


PAIR = chat(("user", QUESTION), ("assistant", ANSWER))
TWO = chat(("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION), ("assistant", ANSWER))
TWICE = [("human", "Hi"), ("gpt", "Hello"), ("human", QUESTION), ("gpt", ANSWER)]
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def lines(name: str, *records: Any) -> Write:
    return lambda folder: put(folder / name, "".join(json.dumps(record) + "\n" for record in records))


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(name: str, *records: dict[str, Any]) -> Write:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(records)), folder / name)

    return write


def arrow(name: str, *records: dict[str, Any]) -> Write:
    def write(folder: Path) -> None:
        table = pa.Table.from_pylist(list(records))
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    return write


def save_dataset(folder: Path, texts: list[str], **state: object) -> Path:
    """Write what `save_to_disk` of the library `datasets` writes, in two shards."""
    folder.mkdir(parents=True)
    files = [f"data-{number:05}-of-00002.arrow" for number in (0, 1)]
    half = len(texts) // 2
    for name, part in zip(files, (texts[:half], texts[half:]), strict=True):
        table = pa.table({"text": part})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "x", **state}
    put(folder / "state.json", json.dumps(state))
    put(folder / "dataset_info.json", "{}")
    return folder


def several(*writes: Write) -> Write:
    return lambda folder: [write(folder) for write in writes]


def shared(turns: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": value} for who, value in turns], **more}


QA = {"question": QUESTION, "answer": ANSWER}
ALPACA = {"instruction": "Tell me.", "input": QUESTION, "output": ANSWER}
TOLD = chat(("user", f"Tell me.\n\n{QUESTION}"), ("assistant", ANSWER))


def expected(parts: list[Part], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the ids of a rendering by hand, and for each id itself if it is trained on, else -100."""
    text = "".join(words for words, _ in parts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learnt = [flag for words, flag in parts for _ in words]
    ids = encoded["input_ids"]
    return ids, [
        token if learnt[begin] else -100 for token, (begin, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]


def is_as_expected(case: Case, item: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a packed sequence has the documents of a case, with the right labels."""
    length = item["input_ids"].numel()
    for documents in itertools.permutations([case.parts, *case.others]):
        rendered = [expected(parts, tokenizer) for parts in documents]
        ids = [token for each, _ in rendered for token in each]
        # The first token of a document cannot be predicted from the document before it.
        labels = [label for _, each in rendered for label in [-100, *each[1:]]]
        if item["input_ids"][0, : len(ids)].tolist() == ids:
            return bool(item["labels"][0].tolist() == [*labels[1:], *[-100] * (length - len(ids) + 1)])
    return False
