"""Files as people have them, and conversations in ChatML by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

Write = Callable[[Path], Any]
Part = tuple[str, bool]  # of the text, and whether it is learnt

TALKS = "loss on the assistant's turns"
QUESTION, ANSWER = "Who was it?", "It was the cat."


def chat(*messages: tuple[str, str], learnt: tuple[int, ...] = ()) -> list[Part]:
    """ChatML by hand; without `learnt` all replies are."""
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


def several(*writes: Write) -> Write:
    return lambda folder: [write(folder) for write in writes]


def shared(turns: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": value} for who, value in turns], **more}


QA = {"question": QUESTION, "answer": ANSWER}
ALPACA = {"instruction": "Tell me.", "input": QUESTION, "output": ANSWER}
TOLD = chat(("user", f"Tell me.\n\n{QUESTION}"), ("assistant", ANSWER))


def expected(parts: list[Part], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    text = "".join(words for words, _ in parts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learnt = [flag for words, flag in parts for _ in words]
    ids = encoded["input_ids"]
    return ids, [
        token if learnt[begin] else -100 for token, (begin, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
