"""A field that has a meaning is read or refused, wherever in the file it first has a value."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.records import Record, read_records
from lightning_pipelite.errors import ConfigurationError

Fields = dict[str, Any]
ASK, REPLY = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It."}
TALK: Fields = {"messages": [ASK, REPLY]}
SHARED: Fields = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "It."}]}
PAIR: Fields = {"prompt": "Who?", "completion": "It."}
ALPACA: Fields = {"instruction": "Tell.", "input": "", "output": "It."}


def calling(call: Fields) -> Fields:
    """Return a conversation that calls a function."""
    return {"conversations": [SHARED["conversations"][0], {"from": "function_call", "value": json.dumps(call)}]}


def read(folder: Path, records: list[Fields], kind: str = ".jsonl", **options: Any) -> tuple[list[Record], list[str]]:
    """Return the records that are read, and the messages about those that are refused."""
    path, refused = folder / f"a{kind}", list[ConfigurationError]()
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[-1])
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = list(read_records(path, DatasetConfig(str(path), **options), refused.append))
    return read, [str(error).removeprefix(str(path)) for error in refused]


@pytest.mark.parametrize(("kind", "empty"), [(".jsonl", ""), (".jsonl", None), (".parquet", None), (".csv", "")])
@pytest.mark.parametrize(
    ("name", "value", "options"),
    [("system", "Be.", {}), ("reasoning", "Hm.", {}), ("history", '[["a", "b"]]', {}),
     ("persona", "Be.", {"system_field": "persona"})],
)  # fmt: skip
def test_a_field_that_is_empty_at_first(
    tmp_path: Path, kind: str, empty: str | None, name: str, value: str, options: Fields
) -> None:
    early, late = read(tmp_path, [{**PAIR, name: empty}] * 25 + [{**PAIR, name: value}], kind, **options)
    assert late == []
    said = json.dumps(early[-1].document)
    assert len(early) == 26
    assert all(word in said for word in (["a", "b"] if name == "history" else [value]))
    assert early[0].document == [ASK, REPLY]


@pytest.mark.parametrize(
    ("record", "more", "options"),
    [
        (PAIR, {"system": "Be."}, {}),
        (PAIR, {"history": [["a", "b"]]}, {"format": "prompt_completion"}),
        (PAIR, {"reasoning": "Hm."}, {"question_field": "prompt", "answer_field": "completion"}),
        (TALK, {"system_prompt": "Be."}, {"messages_field": "messages"}),
        (SHARED, {"system": "Be."}, {"format": "sharegpt"}),
    ],
)
def test_a_field_that_comes_late(tmp_path: Path, record: Fields, more: Fields, options: Fields) -> None:
    documents, (refused,) = read(tmp_path, [record] * 25 + [{**record, **more}], **options)
    assert len(documents) == 25
    assert refused.startswith(f", line 26: none of the first records of the file has the field {next(iter(more))!r}")


@pytest.mark.parametrize(
    ("record", "more", "options"),
    [(TALK, more, options) for options in ({}, {"format": "messages"})
     for more in ({"label": True}, {"label": 0}, {"label": "False"}, {"rejected": "No."}, {"choices": ["a"]},
                  {"completion": "x"}, {"output": "x"}, {"context": "x"}, {"prompt": "x"}, {"history": [["a", "b"]]})]
    + [(SHARED, {"label": 1}, {}), (PAIR, {"label": 1}, {"format": "prompt_completion"}),
       (PAIR, {"rejected": "No."}, {"format": "prompt_completion"}),
       ({"messages": [ASK, REPLY]}, SHARED, {"format": "messages"}),
       ({"instruction": "Who?", "output": "It."}, {"response": "x"}, {"format": "alpaca"}),
       ({"prompt": [ASK], "completion": "It."}, {"input": "x"}, {}),
       ({**PAIR, "reasoning": "Hm."}, {"thinking": "Hm."}, {}), (PAIR, {"input": "x", "context": "y"}, {}),
       (TALK, {"prompt": [{**ASK, "content": "What?"}]}, {}), (TALK, {"prompt": [ASK, REPLY, ASK]}, {}),
       (TALK, {"prompt": "It."}, {}), (SHARED, {"prompt": "It."}, {})],
)  # fmt: skip
@pytest.mark.parametrize("late", [False, True])
def test_what_says_that_it_is_not_to_be_learnt_as_it_is(
    tmp_path: Path, record: Fields, more: Fields, options: Fields, late: bool
) -> None:
    documents, refused = read(tmp_path, [record] * 25 * late + [{**record, **more}], **options)
    assert len(documents) == 25 * late
    assert len(refused) == 1
    assert repr(next(iter(more))).strip("'") in refused[0]


@pytest.mark.parametrize(
    ("record", "options"),
    [({**TALK, "label": "sports"}, {}), ({**TALK, "prompt": "Who?"}, {}), ({**TALK, "completion": ""}, {}),
     ({"messages": json.dumps(TALK["messages"]), "prompt": "Who?"}, {}),
     ({**SHARED, "prompt": "Who?"}, {}), ({**TALK, "prompt": [ASK]}, {}), ({**TALK, "prompt": [ASK, REPLY]}, {}),
     ({**TALK, "prompt": "x"}, {"messages_field": "messages"}),
     ({**PAIR, "label": 1, "choices": "x"}, {"question_field": "prompt", "answer_field": "completion"}),
     ({**TALK, "label": 1}, {"messages_field": "messages"}), ({**PAIR, "messages": None, "text": ""}, {})],
)  # fmt: skip
def test_what_takes_nothing_away(tmp_path: Path, record: Fields, options: Fields) -> None:
    (read_one,), refused = read(tmp_path, [record], **options)
    assert (read_one.document, refused) == ([ASK, REPLY], [])


def test_a_context_of_an_input(tmp_path: Path) -> None:
    (record,), refused = read(tmp_path, [{"input": "Who?", "context": "Here.", "output": "It."}])
    assert refused == []
    assert record.document == [{**ASK, "content": "Who?\n\nHere."}, REPLY]


def test_messages_that_are_none(tmp_path: Path) -> None:
    none = [{"messages": value, "prompt": "x"} for value in (7, "7")]
    documents, refused = read(tmp_path, [TALK] * 25 + none)
    assert len(documents) == 25
    assert ["'prompt' is not the first question of 'messages'" in each for each in refused] == [True, True]


@pytest.mark.parametrize(
    ("record", "text"), [({"output": "It."}, "output"), ({"text": "It.", "prompt": "Who?"}, "text"), (PAIR, "prompt")]
)
def test_texts_that_answer_nothing(tmp_path: Path, record: Fields, text: str) -> None:
    (read_one,), refused = read(tmp_path, [record], text_field=text)
    assert (read_one.document, refused) == (record[text], [])


@pytest.mark.parametrize("question", ["problem", "input"])
def test_a_text_that_answers(tmp_path: Path, question: str) -> None:
    documents, (refused,) = read(tmp_path, [{question: "Who?", "reply": "It."}], text_field="reply")
    assert documents == []
    assert f"which by its name answers {question!r}" in refused


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".csv"])
def test_an_empty_instruction_with_an_input(tmp_path: Path, kind: str) -> None:
    first = {**ALPACA, "instruction": "", "input": "Who?"}
    documents, refused = read(tmp_path, [first] * 25 + [{**first, "instruction": "Tell."}], kind)
    assert refused == []
    assert documents[0].document == [ASK, REPLY]
    assert documents[-1].document == [{**ASK, "content": "Tell.\n\nWho?"}, REPLY]


def test_replies_of_the_history_are_not_learnt(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, [{**ALPACA, "history": [["a", "b"]]}])
    assert [message.get("weight") for message in record.document if message["role"] == "assistant"] == [0, None]  # type: ignore[index, union-attr]


@pytest.mark.parametrize("reply", [{"content": " \n"}, {"content": [{"type": "text", "text": ""}]}])
@pytest.mark.parametrize("more", [{}, {"weight": 0}, {"reasoning_content": "Hm."}, {"tool_calls": [{"name": "f"}]}])
def test_an_empty_reply(tmp_path: Path, reply: Fields, more: Fields) -> None:
    documents, refused = read(tmp_path, [{"messages": [ASK, {"role": "assistant", **reply, **more}]}])
    assert (len(documents), len(refused)) == ((1, 0) if more else (0, 1))
    assert all("line 1: the reply in message 2 of the field 'messages' is empty" in each for each in refused)


def test_the_calls_of_sharegpt(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, [calling({"name": "f", "parameters": {"a": 1}, "id": "x"})])
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "x"}
    assert record.document[1]["tool_calls"] == [call]  # type: ignore[index]
    for wrong in ({"args": {}}, {"arguments": {}, "parameters": {"a": 1}}):
        _, (refused,) = read(tmp_path, [calling({"name": "f", **wrong})])
        assert f"calls a function with {list(wrong)[-1]!r}" in refused


SYSTEM, EMPTY = {"role": "system", "content": "Be."}, {"role": "user", "content": " \n"}
NOTHING = "has no question before the assistant's reply"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([REPLY], NOTHING),
        ([SYSTEM, REPLY, REPLY], NOTHING),
        ([REPLY, ASK], NOTHING),
        ([{"role": "tool", "content": "4"}, REPLY], NOTHING),
        ([EMPTY, REPLY], "the reply in message 2 of the field 'messages' answers an empty question"),
        ([SYSTEM, EMPTY, REPLY, ASK, REPLY], "the reply in message 3 of the field 'messages' answers"),
        ([ASK, REPLY, {"role": "user", "content": [{"type": "text", "text": ""}]}, REPLY], "message 4 of the field"),
        ([{**REPLY, "weight": 1}, ASK, REPLY], "message 1 of the field 'messages' precedes the first question"),
    ],
)
def test_a_reply_to_nothing(tmp_path: Path, messages: list[Fields], says: str) -> None:
    documents, (refused,) = read(tmp_path, [{"messages": messages}, TALK])
    assert len(documents) == 1
    assert says in refused
    if all(isinstance(each["content"], str) for each in messages):
        roles = {"user": "human", "assistant": "gpt"}
        turns = [{**each, "from": roles.get(each["role"], each["role"]), "value": each["content"]} for each in messages]
        shared = [{key: each[key] for key in each if key not in ("role", "content")} for each in turns]
        documents, (refused,) = read(tmp_path, [{"conversations": shared}, SHARED])
        assert len(documents) == 1
        assert says.replace("messages", "conversations") in refused


@pytest.mark.parametrize(
    ("messages", "weights"),
    [
        ([REPLY, ASK, REPLY], [0, None]),
        ([SYSTEM, REPLY, REPLY, ASK, REPLY], [0, 0, None]),
        ([ASK, EMPTY, REPLY], [None]),
        ([EMPTY, {**REPLY, "weight": 0}, ASK, REPLY, {"role": "tool", "content": ""}, REPLY], [0, None, None]),
    ],
)
def test_a_greeting_is_not_learnt(tmp_path: Path, messages: list[Fields], weights: list[int | None]) -> None:
    (record,), refused = read(tmp_path, [{"messages": messages}])
    assert [each.get("weight") for each in record.document if each["role"] == "assistant"] == weights  # type: ignore[index, union-attr]
    assert refused == []


def test_a_prompt_without_a_question(tmp_path: Path) -> None:
    _, (refused,) = read(tmp_path, [{"prompt": [SYSTEM], "completion": [REPLY]}])
    assert NOTHING in refused
