"""Which of the common formats records have, found out from the first of them or as the user has named it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.conversation import REASONING
from lightning_pipelite.data.files import UnreadableFileError, raw_records
from lightning_pipelite.data.shapes import Shape
from lightning_pipelite.data.sources import TEXT, format_of
from lightning_pipelite.errors import ConfigurationError

_FIRST = 20  # records, which are enough to see every field that is not rare

_TEXTS = ("text", "content")
_MESSAGES = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
_MORE = ("input", "context")  # of a question
_ANSWERS = ("output", "completion", "response", "answer", "solution", "reply")
_SYSTEMS = ("system", "system_prompt", "system_message")
_HISTORIES = ("history",)
_REJECTED = ("rejected", "chosen")  # of two answers, one is not to be learnt
_CHOICES = ("choices", "options")  # without which a question is none
_VERDICTS = ("true", "false", "1", "0", "1.0", "0.0")  # of a label that tells good answers from bad ones
_NAMES = {
    ("instruction", "output"): "alpaca",
    ("instruction", "response"): "alpaca",
    ("prompt", "completion"): "prompt/completion",
    ("prompt", "response"): "prompt/response",
    ("question", "answer"): "question/answer",
}

FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (_TEXTS, ()),
    "messages": (_MESSAGES, ()),
    "sharegpt": (_MESSAGES[1:] + _MESSAGES[:1], ()),
    "alpaca": (("instruction",), ("output", "response")),
    "prompt_completion": (("prompt",), ("completion",)),
    "prompt_response": (("prompt",), ("response",)),
    "question_answer": (("question",), ("answer",)),
}
"""By `DatasetConfig.format`: the fields that may hold the text, the messages or the question, and the answer."""


def find_shape(path: Path, dataset: DatasetConfig) -> Shape:
    """Tell how the records of a file become documents.

    Args:
        path: The file. Of records, the first that can be read are looked at.
        dataset: What the user has named.

    Raises:
        ConfigurationError: If it does not fit the file, or nothing is named and the fields could mean two things, or
            nothing. The sentence names what to set.
    """
    if format_of(path) in TEXT:
        return Shape("text", text="text", given=True)
    first: dict[str, Any] = {}
    place = str(path)
    try:
        for raw in itertools.islice(raw_records(path), _FIRST):
            try:
                record = raw.read()
            except Exception:  # it is told when the record's turn comes
                continue
            if isinstance(record, dict):
                place = raw.place if not first else place
                empty = {name: None for name in raw.columns if name not in record}
                first = {**empty, **record, **first, **said_fields(record), **said_fields(first)}
    except Exception:  # as above
        pass
    if dataset.system_field and first and dataset.system_field not in first:
        raise ConfigurationError(
            f"{place}: no field {dataset.system_field!r} ({_having(first)}); correct system_field."
        )
    shape = replace(shape_of(first, dataset, place), seen=tuple(said_fields(first)) or None)
    said = first.get(shape.messages or "")
    message = said[0] if isinstance(said, list) and said and isinstance(said[0], dict) else {}
    if message.get("role") is None and isinstance(message.get("from"), str):
        return replace(shape, name="ShareGPT")
    return shape


def check_text_file(path: Path, dataset: DatasetConfig) -> None:
    """Refuse a text file where the user has named what only records have.

    Raises:
        UnreadableFileError: If so.
    """
    if dataset.messages_field is not None:
        raise UnreadableFileError(f"{path} is text and holds no messages: remove messages_field.")
    names = ("question_field", "system_field", "last_turn_only")
    key = next((name for name in names if getattr(dataset, name)), None)
    if dataset.format not in (None, "text"):
        key = f"format: {dataset.format}"
    if key is not None:
        raise UnreadableFileError(f"{path} is text and holds no conversations: remove {key}, or name files that do.")


def shape_of(record: Mapping[str, Any], dataset: DatasetConfig, place: str) -> Shape:
    """Tell how records with these fields become documents.

    Args:
        record: A record, or what several have together. A field that holds nothing counts where nothing else could
            have its place.
        dataset: What the user has named.
        place: Where it stands, for errors.

    Raises:
        ConfigurationError: See `find_shape`.
    """
    shape = _named(record, dataset, place)
    if shape is None:
        try:
            shape = _found(record, place)
        except ConfigurationError:
            shape = _found(said_fields(record), place)
    if shape.conversation:
        check_marks(said_fields(record), shape, dataset, place)
        system = dataset.system_field or _one(record, _SYSTEMS, "the system prompt", "system_field", place)
        if shape.answer is not None:
            thoughts = tuple(name for name in REASONING if name not in (shape.answer, *shape.question))
            shape = replace(
                shape,
                history=_one(record, _HISTORIES, "what was said before", None, place),
                reasoning=_one(record, thoughts, "the reasoning", None, place),
            )
        return replace(shape, system=system, last_turn_only=dataset.last_turn_only)
    if dataset.system_field or dataset.last_turn_only:
        key = "system_field" if dataset.system_field else "last_turn_only"
        raise ConfigurationError(f"{place}: {key} is for conversations, and this is text; leave it out.")
    return shape


def _named(record: Mapping[str, Any], dataset: DatasetConfig, place: str) -> Shape | None:
    """Return the shape by what the user has named."""
    if dataset.messages_field is not None:
        return Shape("messages", messages=dataset.messages_field, given=True)
    if dataset.question_field is not None and dataset.answer_field is not None:
        return _pair(dataset.question_field, dataset.answer_field, given=True)
    if dataset.text_field is not None:
        if dataset.format != "text":
            _check_no_answer(said_fields(record), dataset.text_field, place)
        return Shape("text", text=dataset.text_field, given=True)
    if dataset.format is None:
        return None
    questions, answers = FIELDS[dataset.format]
    option = "text_field" if dataset.format == "text" else "question_field" if answers else "messages_field"
    question = _one(record, questions, "what is learnt", option, place) or questions[0]
    if dataset.format == "text":
        return Shape("text", text=question, given=True)
    if not answers:
        return Shape(dataset.format, messages=question, given=True)
    answer = _one(record, answers, "the answer", "answer_field", place) or answers[0]
    return _pair(question, answer, given=True)


def _found(record: Mapping[str, Any], place: str) -> Shape:
    """Return the shape by the fields alone."""
    if not record:  # texts without fields, or nothing at all
        return Shape("text", text="text")
    question = _one(record, _QUESTIONS, "the question", "question_field", place)
    answers = [name for name in _ANSWERS if name in record]
    messages = _one(record, _MESSAGES, "the conversation", "messages_field", place)
    text = _one(record, _TEXTS, "the text", "text_field", place)
    if question is None and answers and "input" in record:
        question = "input"
    if question is not None or messages is not None:
        _check_rejected(record, place)
    ways = []
    if messages is not None:
        ways.append((f"messages_field: {messages}", Shape("messages", messages=messages)))
    if text is not None:
        ways.append((f"text_field: {text}", Shape("text", text=text)))
    if question is not None:
        for answer in answers:
            ways.append((f"question_field: {question} and answer_field: {answer}", _pair(question, answer)))
    if len(ways) > 1:
        raise ConfigurationError(
            f"{place}: the fields could mean {'two' if len(ways) == 2 else 'several'} things ({_having(record)}); set "
            f"{', or '.join(way for way, _ in ways)}."
        )
    if text is not None and (answers or question):
        other = f"question_field: {text} with answer_field: {answers[0]}" if answers else ""
        other = other or f"question_field: {question} with answer_field: {text}"
        raise ConfigurationError(
            f"{place}: the fields could mean two things ({_having(record)}); set text_field: {text} for the text "
            f"alone, or {other}."
        )
    if text == "content" and isinstance(record.get("role"), str):
        raise ConfigurationError(
            f"{place}: the record is a single message ({_having(record)}); put the messages of each conversation into "
            "one record, as a list under messages, or set text_field: content for the texts alone."
        )
    if not ways and (answers or question):
        raise ConfigurationError(
            f"{place}: only one side of question and answer is known by its name ({_having(record)}); set "
            "question_field and answer_field to the fields that hold them, or text_field to the one that holds a text."
        )
    if not ways:  # what it has in place of a text is told when it is read
        return Shape("text", text="text")
    return ways[0][1]


def check_marks(record: Mapping[str, Any], shape: Shape, dataset: DatasetConfig, place: str) -> None:
    """Refuse a conversation with fields that say that it is not to be learnt as it is, unless its own are named.

    Args:
        record: Without fields that hold nothing.
        shape: How it becomes a document.
        dataset: What the user has named.
        place: Where it stands, for errors.

    Raises:
        ConfigurationError: If it marks good and bad answers, or has words that the conversation would be without.
    """
    if not shape.conversation or dataset.messages_field is not None or dataset.question_field is not None:
        return
    fields = shape.messages and f"messages_field: {shape.messages}"
    fields = fields or f"question_field: {shape.question[0]} and answer_field: {shape.answer}"
    _check_rejected(record, place)
    if choices := next((name for name in _CHOICES if name in record), None):
        raise ConfigurationError(
            f"{place}: the answers are to questions with {choices!r}, which would not be shown; write them into the "
            f"question, or set {fields} to leave them out."
        )
    if str(record.get("label")).strip().lower() in _VERDICTS:
        raise ConfigurationError(
            f"{place}: the field 'label' marks which answers are good, and all would be learnt; leave the bad ones "
            f"out, and set {fields}."
        )
    if shape.messages is not None:
        beside = next((name for name in (*_ANSWERS, *_MORE, *_HISTORIES) if name in record), None)
        if beside is not None:
            raise ConfigurationError(
                f"{place}: {shape.messages!r} holds a conversation, and {beside!r} stands beside it and would not be "
                f"shown; write it into the messages, or set {fields} to leave it out."
            )
    elif all(name in record for name in _MORE) and shape.question[0] not in _MORE:
        raise ConfigurationError(
            f"{place}: 'input' and 'context' could both be what the question is about; leave one out, or set {fields} "
            "to show both."
        )


def check_prompt(record: Mapping[str, Any], shape: Shape, dataset: DatasetConfig, place: str) -> None:
    """Refuse a conversation that has a question beside it which is not the first one in it.

    Raises:
        ConfigurationError: If so, unless `DatasetConfig.messages_field` is set.
    """
    if shape.messages is None or dataset.messages_field is not None:
        return
    said = record.get(shape.messages)
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except (ValueError, RecursionError):  # it is told when it is read
            return
    turns = [each for each in said if isinstance(each, dict)] if isinstance(said, list) else []
    asked = (each for each in turns if (each.get("role") or each.get("from")) in ("user", "human"))
    first = next(asked, {})
    for name in _QUESTIONS:
        asked_beside = record.get(name)
        begins = isinstance(asked_beside, list) and turns[: len(asked_beside)] == asked_beside
        if asked_beside and not begins and asked_beside not in (first.get("content"), first.get("value")):
            raise ConfigurationError(
                f"{place}: {name!r} is not the first question of {shape.messages!r} and would not be shown; write it "
                f"into the messages, or set messages_field: {shape.messages} to leave it out."
            )


def _check_rejected(record: Mapping[str, Any], place: str) -> None:
    if any(name in record for name in _REJECTED):
        raise ConfigurationError(
            f"{place}: the records have answers to prefer and to avoid ({_having(record)}), and both would be learnt "
            "alike; set messages_field or question_field and answer_field to what is to be learnt."
        )


def _pair(question: str, answer: str, given: bool = False) -> Shape:
    return Shape(
        _NAMES.get((question, answer), "question and answer"),
        question=(question, *(name for name in _MORE if name not in (question, answer))),
        answer=answer,
        given=given,
    )


def _check_no_answer(record: Mapping[str, Any], text: str, place: str) -> None:
    """Refuse to take the answers for texts: they would be learnt without their questions."""
    question = next((name for name in (*_QUESTIONS, "input") if name in record and name != text), None)
    if question is not None and text in (*_ANSWERS, *_REJECTED):
        raise ConfigurationError(
            f"{place}: text_field is {text}, which by its name answers {question!r}, and would be learnt without it; "
            f"set question_field: {question} and answer_field: {text} in its place, or format: text beside it if that "
            "is meant."
        )


def _one(record: Mapping[str, Any], names: tuple[str, ...], what: str, option: str | None, place: str) -> str | None:
    """Return the field of these that is there; of several, the one that holds something."""
    there = [name for name in names if name in record]
    if len(there) > 1:
        there = [name for name in there if name in said_fields(record)]
    if len(there) > 1:
        remedy = f"set {option} to one of them" if option else "leave one out"
        raise ConfigurationError(f"{place}: {' and '.join(there)} could both be {what}; {remedy}.")
    return there[0] if there else None


def _having(record: Mapping[str, Any]) -> str:
    return f"it has: {', '.join(sorted(map(readable, record)))}"


def said_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that hold something."""
    return {key: value for key, value in record.items() if value is not None and value != "" and value != []}


def readable(name: str) -> str:
    """Give a key as it can be shown: on one line, short, and without half a surrogate pair, which no terminal takes."""
    shown = name if name.isprintable() else name.encode("unicode_escape").decode()
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def vocabulary() -> Iterable[str]:
    """Give all field names that mean something, so that no column that would change the format is left unread."""
    marks = (*_REJECTED, *_CHOICES, "label")
    return {*_TEXTS, *_MESSAGES, *_QUESTIONS, *_MORE, *_ANSWERS, *_SYSTEMS, *_HISTORIES, *REASONING, *marks}
