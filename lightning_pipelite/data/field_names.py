"""Common field names of records, by what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_pipelite.data.conversation import REASONING
from lightning_pipelite.errors import ConfigurationError

TEXTS = ("text", "content")
MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
MORE = ("input", "context")  # what a question is about
ANSWERS = ("output", "completion", "response", "answer", "solution", "reply")
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history",)
REJECTED = ("rejected", "chosen")  # preference data: one of the two answers must not be learnt
CHOICES = ("choices", "options")  # a multiple-choice question is incomplete without them
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # cannot be shown as text
VERDICTS = ("true", "false", "1", "0", "1.0", "0.0")  # values of a label that tells good answers from bad ones


def vocabulary() -> Iterable[str]:
    """Return all field names with a meaning, so that every column that would change the format is read."""
    marks = (*REJECTED, *CHOICES, *MEDIA, "label")
    return {*TEXTS, *MESSAGES, *QUESTIONS, *MORE, *ANSWERS, *SYSTEMS, *HISTORIES, *REASONING, *marks}


def one_of(record: Mapping[str, Any], names: tuple[str, ...], what: str, option: str | None, place: str) -> str | None:
    """Return which of these fields the record has; if it has several, the one that is not empty.

    Args:
        record: The record.
        names: Names of the fields.
        what: What the fields stand for, for the message.
        option: The option that would select one of them; None if there is none.
        place: Location of the record, for the message.

    Raises:
        ConfigurationError: If several of them are not empty.
    """
    there = [name for name in names if name in record]
    if len(there) > 1:
        there = [name for name in there if name in said_fields(record)]
    if len(there) > 1:
        remedy = f"set {option} to one of them" if option else "leave one out"
        raise ConfigurationError(f"{place}: {' and '.join(there)} could both be {what}; {remedy}.")
    return there[0] if there else None


def having(record: Mapping[str, Any]) -> str:
    """Return a list of a record's fields, for a message."""
    return f"found: {', '.join(sorted(map(readable, record)))}"


def said_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not empty."""
    return {key: value for key, value in record.items() if value is not None and value != "" and value != []}


def readable(name: str) -> str:
    """Return a key in printable form: short, on one line, and without lone surrogates, which cannot be printed."""
    shown = name if name.isprintable() else name.encode("unicode_escape").decode()
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
