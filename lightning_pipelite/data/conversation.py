"""Checks of conversations and of the other keys in a record: nothing meaningful is silently ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lightning_pipelite.errors import ConfigurationError

Message = dict[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The keys that may hold a message's reasoning; transformers passes whichever is present to the template."""

OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant"}
"""Alternative names of roles, and the role that each stands for."""

ARGUMENTS = ("tools", "documents", "chat_template_kwargs")
"""Keys of a record, besides the conversation, that are passed to the chat template."""

# Keys by which other trainers weight or exclude a record, each with the value that makes it count like any other.
_RECORD_WEIGHTS = {
    "weight": 1, "weights": 1, "loss_weight": 1, "sample_weight": 1, "loss_mask": 1, "completion_mask": 1,
    "train_on": 1, "train_on_turn": 1, "trainable": 1, "is_trained": 1,
    "mask": None, "masked": 0, "ignore": 0, "ignored": 0, "skip": 0,
}  # fmt: skip
# Keys by which other trainers include or exclude a message. Only OpenAI's form, "weight", is supported.
_MESSAGE_FLAGS = (
    "train", "training", "train_on_turn", "train_detail", "training_detail", "loss", "loss_weight", "loss_mask",
    "mask", "masked",
)  # fmt: skip
# Parameters of apply_chat_template, and values that a record specifies elsewhere.
_RESERVED = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
_DEEPEST = 64  # no JSON Schema written by hand is nested deeper


def check_weights(record: Mapping[str, Any], place: str) -> None:
    """Refuse a record with a weight of its own, because all records count alike.

    Args:
        record: The record.
        place: Location of the record, for errors.

    Raises:
        ConfigurationError: If a weighting key has a value that would make the record count differently from others.
    """
    for key, as_others in _RECORD_WEIGHTS.items():
        if (value := record.get(key)) is not None and value != as_others:
            raise ConfigurationError(
                f"{place}: the record has a {key!r} of {_shown(value)}, but all records count equally; leave out the "
                "key or the record, or move such records to a dataset of their own and set its weight."
            )


def known_keys(conversations: bool) -> tuple[str, ...]:
    """Return the record keys that have a meaning, besides the fields that hold the text or the conversation."""
    return (*_RECORD_WEIGHTS, *ARGUMENTS, "functions") if conversations else (*_RECORD_WEIGHTS,)


def check_messages(value: Any, place: str, what: str) -> list[Message]:
    """Check the messages of a conversation and return them without empty keys.

    Args:
        value: The value in the record.
        place: Location of the record, for errors.
        what: The field that holds the value, for errors.

    Raises:
        ConfigurationError: If the value is not a valid conversation, or the assistant says nothing in it.
    """
    if not isinstance(value, list) or not value:
        raise ConfigurationError(f"{place}: {what} must be a non-empty list of messages.")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigurationError(f"{place}: message {number} of {what} has no role; add one.")
        check_value(message, place, f"message {number} of {what}")
        _check_content(message, place, f"the content of message {number} of {what}")
        _check_flags(message, place, f"message {number} of {what}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise ConfigurationError(
                f"{place}: the tool_calls of message {number} of {what} must be a list of objects."
            )
    if all(message["role"] != "assistant" for message in value):
        for number, message in enumerate(value, start=1):
            if (meant := OTHER_ROLES.get(message["role"].lower())) is not None:
                role = message["role"]
                raise ConfigurationError(f"{place}: the role of message {number} is {role!r}; change it to {meant}.")
        raise ConfigurationError(f"{place}: {what} has no assistant message, so there is nothing to learn; remove it.")
    # Templates take an empty key for a missing one. Columnar files always have every key, so content is always kept.
    return [
        {
            **{key: each for key, each in message.items() if not _is_nothing(key, each)},
            "content": message.get("content"),
        }
        for message in value
    ]


def template_arguments(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a record's arguments for the chat template, besides the messages.

    Args:
        record: The record; each of the keys `ARGUMENTS` may be missing, null or empty.
        place: Location of the record, for errors.

    Returns:
        Keyword arguments for `apply_chat_template`.

    Raises:
        ConfigurationError: If one of them is not of the type that chat templates take.
    """
    if record.get("functions"):
        raise ConfigurationError(
            f"{place}: the record has functions, which are deprecated in favour of tools; convert each to a "
            'tool, {"type": "function", "function": ...}.'
        )
    arguments: dict[str, Any] = {}
    for key in ARGUMENTS:
        value = record.get(key)
        if isinstance(value, str) and value.strip():  # columnar files store values that vary in structure as JSON text
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ConfigurationError(f"{place}: {key} is text, but not valid JSON ({error}); correct it.") from None
        if value is None or value == "" or value == [] or value == {}:
            continue
        check_value(value, place, key)
        if key == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise ConfigurationError(f"{place}: {key} must be an object, not {type(value).__name__}.")
            if wrong := sorted({*value} & {*_RESERVED}):
                raise ConfigurationError(
                    f"{place}: {key} contains {wrong[0]!r}, which must be a field of the record; remove it."
                )
            arguments |= {name: each for name, each in value.items() if each is not None}
        elif not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise ConfigurationError(f"{place}: {key} must be a list of objects.")
        else:
            arguments[key] = value
    return arguments


def check_value(value: Any, place: str, what: str, depth: int = 0) -> None:
    """Refuse values that are not JSON, or that a template would not render faithfully.

    Raises:
        ConfigurationError: If the value contains a non-finite number, text that cannot be encoded, or a type that JSON
            does not have, or is nested too deeply.
    """
    if isinstance(value, str):
        check_text(value, place, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{place}: {what} contains {value}, which is not valid JSON; correct it.")
    elif isinstance(value, (dict, list)):
        if depth == _DEEPEST:
            raise ConfigurationError(f"{place}: {what} is nested too deeply; correct it.")
        for each in value if isinstance(value, list) else [*value, *value.values()]:
            check_value(each, place, what, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ConfigurationError(
            f"{place}: {what} contains {type(value).__name__}, which is not a JSON type; write it as text."
        )


def check_text(value: str, place: str, what: str) -> None:
    """Refuse text that no tokenizer accepts: text that cannot be encoded as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"{place}: {what} contains half of a surrogate pair, which is not valid text; fix it."
        ) from None


def learnt(message: Message) -> bool:
    """Return whether a message is learnt: the assistant's messages are, unless their weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _check_content(message: Message, place: str, what: str) -> None:
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise ConfigurationError(f"{place}: {what} must be a string, not {type(content).__name__}.")
        return
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ConfigurationError(
                f"{place}: {what} has a part of type {kind}, but only text is supported; make it a string, or a list "
                "of parts of type text."
            )
    if not content:
        raise ConfigurationError(f"{place}: {what} must be a string, not an empty list.")


def _check_flags(message: Message, place: str, what: str) -> None:
    for key in _MESSAGE_FLAGS:
        if message.get(key) is not None:
            raise ConfigurationError(
                f"{place}: {what} has {key!r}; use a weight of 0 or 1 instead to mark which replies are learnt."
            )
    weight = message.get("weight")
    if weight is None:
        return
    if weight not in (0, 1) or (weight == 1 and message["role"] != "assistant"):
        raise ConfigurationError(
            f"{place}: {what} has a weight of {_shown(weight)}; use 0 or 1 for the assistant's messages, and none for "
            "others."
        )


def _is_nothing(key: str, value: Any) -> bool:
    """Return whether a key is empty; many templates treat even an empty tool_calls as a call, so it is removed."""
    return value is None or (key == "tool_calls" and not value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}..."
