"""What the fields of records are commonly called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_pipelite.data.conversation import REASONING
from lightning_pipelite.errors import ConfigurationError

TEXTS = ("text", "content")
MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
MORE = ("input", "context")  # of a question
ANSWERS = ("output", "completion", "response", "answer", "solution", "reply")
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history",)
REJECTED = ("rejected", "chosen")  # of two answers, one is not to be learnt
CHOICES = ("choices", "options")  # without which a question is none
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # which no text shows
VERDICTS = ("true", "false", "1", "0", "1.0", "0.0")  # of a label that tells good answers from bad ones


def vocabulary() -> Iterable[str]:
    """Give all field names that mean something, so that no column that would change the format is left unread."""
    marks = (*REJECTED, *CHOICES, *MEDIA, "label")
    return {*TEXTS, *MESSAGES, *QUESTIONS, *MORE, *ANSWERS, *SYSTEMS, *HISTORIES, *REASONING, *marks}


def one_of(record: Mapping[str, Any], names: tuple[str, ...], what: str, option: str | None, place: str) -> str | None:
    """Return the field of these that is there; of several, the one that holds something.

    Args:
        record: That has them.
        names: Of the fields.
        what: They stand for, for the message.
        option: That would name one; None if there is none.
        place: Where the record stands, for the message.

    Raises:
        ConfigurationError: If several hold something.
    """
    there = [name for name in names if name in record]
    if len(there) > 1:
        there = [name for name in there if name in said_fields(record)]
    if len(there) > 1:
        remedy = f"set {option} to one of them" if option else "leave one out"
        raise ConfigurationError(f"{place}: {' and '.join(there)} could both be {what}; {remedy}.")
    return there[0] if there else None


def having(record: Mapping[str, Any]) -> str:
    """Return what a record has, for a message."""
    return f"it has: {', '.join(sorted(map(readable, record)))}"


def said_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that hold something."""
    return {key: value for key, value in record.items() if value is not None and value != "" and value != []}


def readable(name: str) -> str:
    """Give a key as it can be shown: on one line, short, and without half a surrogate pair, which no terminal takes."""
    shown = name if name.isprintable() else name.encode("unicode_escape").decode()
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
