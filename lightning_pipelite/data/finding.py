"""Determines the format of records, from the user's options or from the first records."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.conversation import REASONING
from lightning_pipelite.data.field_names import (
    ANSWERS,
    HISTORIES,
    MESSAGES,
    MORE,
    QUESTIONS,
    REJECTED,
    SYSTEMS,
    TEXTS,
    having,
    one_of,
    said_fields,
)
from lightning_pipelite.data.files import UnreadableFileError, raw_records
from lightning_pipelite.data.formats import TEXT, format_of
from lightning_pipelite.data.marks import check_marks, check_no_answer, check_rejected
from lightning_pipelite.data.shapes import Shape
from lightning_pipelite.errors import ConfigurationError

_FIRST = 20  # records to look at: enough to see every field that is not rare

_NAMES = {
    ("instruction", "output"): "alpaca",
    ("instruction", "response"): "alpaca",
    ("prompt", "completion"): "prompt/completion",
    ("prompt", "response"): "prompt/response",
    ("question", "answer"): "question/answer",
}

FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (TEXTS, ()),
    "messages": (MESSAGES, ()),
    "sharegpt": (MESSAGES[1:] + MESSAGES[:1], ()),
    "alpaca": (("instruction",), ("output", "response")),
    "prompt_completion": (("prompt",), ("completion",)),
    "prompt_response": (("prompt",), ("response",)),
    "question_answer": (("question",), ("answer",)),
}
"""For each `DatasetConfig.format`: the fields that may hold the text, messages or question, and the answer fields."""


def find_shape(path: Path, dataset: DatasetConfig) -> Shape:
    """Determine how the records of a file become documents.

    Args:
        path: The file; its first readable records are examined.
        dataset: The user's options.

    Raises:
        ConfigurationError: If the options do not fit the file, or no fields are configured and those of the records are
            ambiguous or unknown. The message names the options to set.
    """
    if format_of(path) in TEXT:
        return Shape("text", text="text", given=True)
    first: dict[str, Any] = {}
    place = str(path)
    try:
        for raw in itertools.islice(raw_records(path), _FIRST):
            try:
                record = raw.read()
            except Exception:  # reported later, when the record itself is read
                continue
            if isinstance(record, dict):
                place = raw.place if not first else place
                empty = {name: None for name in raw.columns if name not in record}
                first = {**empty, **record, **first, **said_fields(record), **said_fields(first)}
    except Exception:  # as above
        pass
    if dataset.system_field and first and dataset.system_field not in first:
        raise ConfigurationError(f"{place}: no field {dataset.system_field!r} ({having(first)}); correct system_field.")
    shape = replace(shape_of(first, dataset, place), seen=tuple(said_fields(first)) or None)
    said = first.get(shape.messages or "")
    message = said[0] if isinstance(said, list) and said and isinstance(said[0], dict) else {}
    if message.get("role") is None and isinstance(message.get("from"), str):
        return replace(shape, name="ShareGPT")
    return shape


def check_text_file(path: Path, dataset: DatasetConfig) -> None:
    """Refuse a text file if the user has set options that apply only to records.

    Raises:
        UnreadableFileError: If one is set.
    """
    if dataset.messages_field is not None:
        raise UnreadableFileError(f"{path} is a text file, which has no messages: remove messages_field.")
    names = ("question_field", "system_field", "last_turn_only")
    key = next((name for name in names if getattr(dataset, name)), None)
    if dataset.format not in (None, "text"):
        key = f"format: {dataset.format}"
    if key is not None:
        raise UnreadableFileError(
            f"{path} is a text file, which has no conversations: remove {key}, or name files that have them."
        )


def shape_of(record: Mapping[str, Any], dataset: DatasetConfig, place: str) -> Shape:
    """Determine how records with these fields become documents.

    Args:
        record: A record, or the combined fields of several. Empty fields are ignored if they would make it ambiguous.
        dataset: The user's options.
        place: Location of the record, for errors.

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
        system = dataset.system_field or one_of(record, SYSTEMS, "the system prompt", "system_field", place)
        if shape.answer is not None:
            thoughts = tuple(name for name in REASONING if name not in (shape.answer, *shape.question))
            shape = replace(
                shape,
                history=one_of(record, HISTORIES, "what was said before", None, place),
                reasoning=one_of(record, thoughts, "the reasoning", None, place),
            )
        return replace(shape, system=system, last_turn_only=dataset.last_turn_only)
    if dataset.system_field or dataset.last_turn_only:
        key = "system_field" if dataset.system_field else "last_turn_only"
        raise ConfigurationError(f"{place}: {key} applies to conversations, but this is text; leave it out.")
    return shape


def _named(record: Mapping[str, Any], dataset: DatasetConfig, place: str) -> Shape | None:
    """Return the shape that the user's options determine, or None if they leave it open."""
    if dataset.messages_field is not None:
        return Shape("messages", messages=dataset.messages_field, given=True)
    if dataset.question_field is not None and dataset.answer_field is not None:
        return _pair(dataset.question_field, dataset.answer_field, given=True)
    if dataset.text_field is not None:
        if dataset.format != "text":
            check_no_answer(said_fields(record), dataset.text_field, place)
        return Shape("text", text=dataset.text_field, given=True)
    if dataset.format is None:
        return None
    questions, answers = FIELDS[dataset.format]
    option = "text_field" if dataset.format == "text" else "question_field" if answers else "messages_field"
    question = one_of(record, questions, "what is learnt", option, place) or questions[0]
    if dataset.format == "text":
        return Shape("text", text=question, given=True)
    if not answers:
        return Shape(dataset.format, messages=question, given=True)
    answer = one_of(record, answers, "the answer", "answer_field", place) or answers[0]
    return _pair(question, answer, given=True)


def _found(record: Mapping[str, Any], place: str) -> Shape:
    """Return the shape that the fields alone determine."""
    if not record:  # bare strings, or no readable record at all
        return Shape("text", text="text")
    question = one_of(record, QUESTIONS, "the question", "question_field", place)
    answers = [name for name in ANSWERS if name in record]
    messages = one_of(record, MESSAGES, "the conversation", "messages_field", place)
    text = one_of(record, TEXTS, "the text", "text_field", place)
    if question is None and answers and "input" in record:
        question = "input"
    if question is not None or messages is not None or all(name in record for name in REJECTED):
        check_rejected(record, place)
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
            f"{place}: the fields could mean {'two' if len(ways) == 2 else 'several'} things ({having(record)}); set "
            f"{', or '.join(way for way, _ in ways)}."
        )
    if text is not None and (answers or question):
        other = f"question_field: {text} with answer_field: {answers[0]}" if answers else ""
        other = other or f"question_field: {question} with answer_field: {text}"
        raise ConfigurationError(
            f"{place}: the fields could mean two things ({having(record)}); set text_field: {text} for the text "
            f"alone, or {other}."
        )
    if text == "content" and isinstance(record.get("role"), str):
        raise ConfigurationError(
            f"{place}: the record is a single message ({having(record)}); put the messages of each conversation into "
            "one record, as a list under messages, or set text_field: content for the texts alone."
        )
    if not ways and (answers or question):
        raise ConfigurationError(
            f"{place}: only one of question and answer is recognised by its name ({having(record)}); set "
            "question_field and answer_field to the fields that hold them, or text_field to the one that holds a text."
        )
    if not ways:  # the error about the missing field is raised when the record is read
        return Shape("text", text="text")
    return ways[0][1]


def _pair(question: str, answer: str, given: bool = False) -> Shape:
    return Shape(
        _NAMES.get((question, answer), "question and answer"),
        question=(question, *(name for name in MORE if name not in (question, answer))),
        answer=answer,
        given=given,
    )
