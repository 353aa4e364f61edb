"""Checks for fields which show that a record must not be learnt as it is, or not without them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.field_names import (
    ANSWERS,
    CHOICES,
    HISTORIES,
    MEDIA,
    MORE,
    QUESTIONS,
    REJECTED,
    VERDICTS,
    having,
)
from lightning_pipelite.data.shapes import Shape
from lightning_pipelite.errors import ConfigurationError


def check_marks(record: Mapping[str, Any], shape: Shape, dataset: DatasetConfig, place: str) -> None:
    """Refuse a conversation if other fields of the record show that it must not be learnt as it is.

    Nothing is checked if the user has configured the fields of the conversation.

    Args:
        record: The record, without empty fields.
        shape: How it becomes a document.
        dataset: The user's options.
        place: Location of the record, for errors.

    Raises:
        ConfigurationError: If it marks good and bad answers, or has content that the conversation would lack.
    """
    if not shape.conversation or dataset.messages_field is not None or dataset.question_field is not None:
        return
    fields = shape.messages and f"messages_field: {shape.messages}"
    fields = fields or f"question_field: {shape.question[0]} and answer_field: {shape.answer}"
    check_rejected(record, place)
    if choices := next((name for name in CHOICES if name in record), None):
        raise ConfigurationError(
            f"{place}: the question comes with {choices!r}, which would be ignored; add them to the question, or set "
            f"{fields} to leave them out."
        )
    if media := next((name for name in MEDIA if name in record), None):
        raise ConfigurationError(
            f"{place}: the conversation is about {media!r}, which would be ignored; leave such records out, or set "
            f"{fields} to learn the text alone."
        )
    if str(record.get("label")).strip().lower() in VERDICTS:
        raise ConfigurationError(
            f"{place}: the field 'label' marks which answers are good, but all would be learnt; leave the bad ones "
            f"out, and set {fields}."
        )
    if shape.messages is not None:
        beside = next((name for name in (*ANSWERS, *MORE, *HISTORIES) if name in record), None)
        if beside is not None:
            raise ConfigurationError(
                f"{place}: {shape.messages!r} holds a conversation, so {beside!r} would be ignored; add it to the "
                f"messages, or set {fields} to leave it out."
            )
    elif all(name in record for name in MORE) and shape.question[0] not in MORE:
        raise ConfigurationError(
            f"{place}: 'input' and 'context' could both be what the question is about; leave one out, or set {fields} "
            "to show both."
        )


def check_prompt(record: Mapping[str, Any], shape: Shape, dataset: DatasetConfig, place: str) -> None:
    """Refuse a record with a question field that differs from the first question of its conversation.

    Raises:
        ConfigurationError: If it has one, unless `DatasetConfig.messages_field` is set.
    """
    if shape.messages is None or dataset.messages_field is not None:
        return
    said = record.get(shape.messages)
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except (ValueError, RecursionError):  # reported when the messages are read
            return
    turns = [each for each in said if isinstance(each, dict)] if isinstance(said, list) else []
    asked = (each for each in turns if (each.get("role") or each.get("from")) in ("user", "human"))
    first = next(asked, {})
    for name in QUESTIONS:
        asked_beside = record.get(name)
        begins = isinstance(asked_beside, list) and turns[: len(asked_beside)] == asked_beside
        if asked_beside and not begins and asked_beside not in (first.get("content"), first.get("value")):
            raise ConfigurationError(
                f"{place}: {name!r} is not the first question of {shape.messages!r} and would be ignored; add it to "
                f"the messages, or set messages_field: {shape.messages} to leave it out."
            )


def check_rejected(record: Mapping[str, Any], place: str) -> None:
    """Refuse preference data, whose records also have answers to avoid.

    Raises:
        ConfigurationError: If the record has a field for preferred or rejected answers.
    """
    if any(name in record for name in REJECTED):
        raise ConfigurationError(
            f"{place}: the records have preferred and rejected answers ({having(record)}), so training would learn "
            "both; set messages_field, or question_field and answer_field, to what is to be learnt."
        )


def check_no_answer(record: Mapping[str, Any], text: str, place: str) -> None:
    """Refuse answers as texts, because they would be learnt without their questions.

    Raises:
        ConfigurationError: If the record has a question, and ``text``, the field to be used, is named like an answer.
    """
    question = next((name for name in (*QUESTIONS, "input") if name in record), None)
    if question is not None and text in (*ANSWERS, *REJECTED):
        raise ConfigurationError(
            f"{place}: text_field is {text}, which by its name answers {question!r}, and would be learnt without it; "
            f"set question_field: {question} and answer_field: {text} instead, or add format: text if that is intended."
        )
