"""What a record says beside its words, and what is refused of it: nothing that means something is passed over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lightning_pipelite.errors import ConfigurationError

Message = dict[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which transformers hands a message's reasoning to a template, whichever of them it has."""

OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant"}
"""What others call a role."""

ARGUMENTS = ("tools", "documents", "chat_template_kwargs")
"""Keys of a record, beside the conversation, that are for the chat template."""

# What other trainers take as "count this record otherwise, or not at all", and the value by which it counts as others.
_RECORD_WEIGHTS = {
    "weight": 1, "weights": 1, "loss_weight": 1, "sample_weight": 1, "loss_mask": 1, "completion_mask": 1,
    "train_on": 1, "train_on_turn": 1, "trainable": 1, "is_trained": 1,
    "mask": None, "masked": 0, "ignore": 0, "ignored": 0, "skip": 0,
}  # fmt: skip
# What other trainers take as "learn from this message, or do not". One form is enough: OpenAI's.
_MESSAGE_FLAGS = (
    "train", "training", "train_on_turn", "train_detail", "training_detail", "loss", "loss_weight", "loss_mask",
    "mask", "masked",
)  # fmt: skip
# Parameters of apply_chat_template, and what a record has elsewhere.
_RESERVED = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
_DEEPEST = 64  # of JSON Schemas people write by hand none is deeper


def check_weights(record: Mapping[str, Any], place: str) -> None:
    """Refuse a record that asks to count more or less than others, which it would not.

    Args:
        record: What is known of its keys.
        place: Where it stands, for errors.

    Raises:
        ConfigurationError: If a key for that is there and does not say that it counts as the others.
    """
    for key, as_others in _RECORD_WEIGHTS.items():
        if (value := record.get(key)) is not None and value != as_others:
            raise ConfigurationError(
                f"{place}: the record has a {key!r} of {_shown(value)}, but all records count alike; leave records or "
                "the key out, or put them into datasets of their own, which have a weight."
            )


def known_keys(conversations: bool) -> tuple[str, ...]:
    """Give the keys of a record that mean something beside the field of the text or the conversation."""
    return (*_RECORD_WEIGHTS, *ARGUMENTS, "functions") if conversations else (*_RECORD_WEIGHTS,)


def check_messages(value: Any, place: str, what: str) -> list[Message]:
    """Give the messages of a conversation without the keys that hold nothing.

    Args:
        value: What the record holds.
        place: Where it stands, for errors.
        what: What holds it, for errors.

    Raises:
        ConfigurationError: If it is no conversation, or no message of it is the assistant's.
    """
    if not isinstance(value, list) or not value:
        raise ConfigurationError(f"{place}: {what} is no list of messages; give one.")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigurationError(f"{place}: message {number} of {what} has no role; give it one.")
        check_value(message, place, f"message {number} of {what}")
        _check_content(message, place, f"the content of message {number} of {what}")
        _check_flags(message, place, f"message {number} of {what}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise ConfigurationError(f"{place}: the tool_calls of message {number} of {what} are no list of objects.")
    if all(message["role"] != "assistant" for message in value):
        for number, message in enumerate(value, start=1):
            if (meant := OTHER_ROLES.get(message["role"].lower())) is not None:
                role = message["role"]
                raise ConfigurationError(f"{place}: the role of message {number} is {role!r}; write {meant}.")
        raise ConfigurationError(f"{place}: {what} has no message of the assistant, so nothing to learn; remove it.")
    # For a chat template, a key that holds nothing is not there. Columns leave none out, so content is always there.
    return [
        {
            **{key: each for key, each in message.items() if not _is_nothing(key, each)},
            "content": message.get("content"),
        }
        for message in value
    ]


def template_arguments(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Give what a record has for the chat template beside the messages.

    Args:
        record: With the keys `ARGUMENTS`, any of which may be missing, null or empty.
        place: Where it stands, for errors.

    Returns:
        Arguments of `apply_chat_template`.

    Raises:
        ConfigurationError: If one of them is not what chat templates take.
    """
    if record.get("functions"):
        raise ConfigurationError(
            f'{place}: the record has functions, which became tools; write them as tools, each {{"type": "function", '
            '"function": ...}.'
        )
    arguments: dict[str, Any] = {}
    for key in ARGUMENTS:
        value = record.get(key)
        if isinstance(value, str) and value.strip():  # in columns, text is the way to keep what differs by record
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ConfigurationError(f"{place}: {key} is text but no JSON ({error}); correct it.") from None
        if value is None or value == "" or value == [] or value == {}:
            continue
        check_value(value, place, key)
        if key == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise ConfigurationError(f"{place}: {key} is {type(value).__name__}; give an object.")
            if wrong := sorted({*value} & {*_RESERVED}):
                raise ConfigurationError(f"{place}: {key} holds {wrong[0]!r}, which is set elsewhere; take it out.")
            arguments |= {name: each for name, each in value.items() if each is not None}
        elif not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise ConfigurationError(f"{place}: {key} is no list of objects; give one.")
        else:
            arguments[key] = value
    return arguments


def check_value(value: Any, place: str, what: str, depth: int = 0) -> None:
    """Refuse what is no JSON, or would not come through a template as it is.

    Raises:
        ConfigurationError: If there is a number that is not finite, text that is none, another type than those of
            JSON, or a nesting deeper than any that is meant.
    """
    if isinstance(value, str):
        check_text(value, place, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{place}: {what} holds {value}, which is no JSON; correct it.")
    elif isinstance(value, (dict, list)):
        if depth == _DEEPEST:
            raise ConfigurationError(f"{place}: {what} is nested too deeply; correct it.")
        for each in value if isinstance(value, list) else [*value, *value.values()]:
            check_value(each, place, what, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ConfigurationError(f"{place}: {what} holds {type(value).__name__}, which is no JSON; write it as text.")


def check_text(value: str, place: str, what: str) -> None:
    """Refuse text that no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{place}: {what} holds half a surrogate pair, which is no text; repair it.") from None


def learnt(message: Message) -> bool:
    """Tell whether a message is to be learnt: the assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _check_content(message: Message, place: str, what: str) -> None:
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise ConfigurationError(f"{place}: {what} is {type(content).__name__}, not text; give it a string.")
        return
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ConfigurationError(
                f"{place}: {what} is list, not text alone: it has a part of type {kind}; give it a string, or parts of "
                "type text."
            )
    if not content:
        raise ConfigurationError(f"{place}: {what} is list, not text, and empty; give it a string.")


def _check_flags(message: Message, place: str, what: str) -> None:
    for key in _MESSAGE_FLAGS:
        if message.get(key) is not None:
            raise ConfigurationError(
                f"{place}: {what} has {key!r}; say which replies are learnt by a weight of 0 or 1 in its place."
            )
    weight = message.get("weight")
    if weight is None:
        return
    if weight not in (0, 1) or (weight == 1 and message["role"] != "assistant"):
        raise ConfigurationError(
            f"{place}: {what} has a weight of {_shown(weight)}; give the assistant's messages 0 or 1, and others none."
        )


def _is_nothing(key: str, value: Any) -> bool:
    """Whether a key says nothing: many templates take a message with tool_calls for one that calls, be they none."""
    return value is None or (key == "tool_calls" and not value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}..."
