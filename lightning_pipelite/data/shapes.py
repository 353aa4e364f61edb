"""Turns a record into a document: a text, messages, or a question and its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_pipelite.data.conversation import REASONING, Message, check_messages, check_text
from lightning_pipelite.data.replies import check_replies, last_turn, without_greeting
from lightning_pipelite.errors import ConfigurationError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
"""Speaker names of ShareGPT and similar formats, and the corresponding roles in chat templates."""

Document = str | list[Message]


@dataclass(frozen=True)
class Shape:
    """The fields of a record that make up its document. Exactly one of `text`, `messages` and `answer` is set.

    Args:
        name: Common name of the format.
        text: The field that holds a text.
        messages: The field that holds the messages of a conversation.
        question: The fields that make up the question, joined by blank lines.
        answer: The field that holds the answer.
        history: The field that holds earlier turns, as pairs of a question and an answer.
        system: The field that holds the system prompt.
        reasoning: The field that holds the reasoning before the answer.
        last_turn_only: Whether only what is said after the last question is learnt.
        speaker: What is learnt from messages, for the one-line description.
        given: Whether the user has configured the fields.
        seen: Fields that the first records have, for the one-line description.
    """

    name: str
    text: str | None = None
    messages: str | None = None
    question: tuple[str, ...] = ()
    answer: str | None = None
    history: str | None = None
    system: str | None = None
    reasoning: str | None = None
    last_turn_only: bool = False
    speaker: str = "the assistant's turns"
    given: bool = False
    seen: tuple[str, ...] | None = None

    @property
    def conversation(self) -> bool:
        """Whether it is a conversation, not a text."""
        return self.text is None

    @property
    def needed(self) -> tuple[str, ...]:
        """The fields that a record must have."""
        return tuple(name for name in (self.text, self.messages, *self.question[:1], self.answer) if name)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that are read, in the order in which they are listed."""
        names = (self.text, self.messages, self.system, self.history, *self.question, self.reasoning, self.answer)
        return tuple(name for name in names if name)

    def __str__(self) -> str:
        learnt = "everything" if not self.conversation else self.answer or self.speaker
        last = " of the last turn" if self.last_turn_only else ""
        shown = self.fields if self.seen is None else [name for name in self.fields if name in self.seen]
        return f"{self.name}: {', '.join(shown)}; loss on {learnt}{last}"

    def document(self, record: dict[str, Any], place: str) -> Document:
        """Make the document of a record that has all `needed` fields.

        Raises:
            ConfigurationError: If a field holds something invalid.
        """
        if self.text is not None:
            value = record[self.text]
            if not isinstance(value, str):
                what = f"the field {self.text!r}"
                raise ConfigurationError(f"{place}: {what} must be a string, not {type(value).__name__}.")
            check_text(value, place, f"the field {self.text!r}")
            return value
        if self.messages is not None:
            what = f"the field {self.messages!r}"
            messages = _conversation(record[self.messages], place, what)
        else:
            what = "the record"
            messages = [*self._history(record, place), *self._question(record, place), *self._answer(record, place)]
        if isinstance(messages, list):  # otherwise check_messages refuses it
            messages = [*self._system(record, messages, place), *messages]
        checked = check_messages(messages, place, what)
        checked = last_turn(checked) if self.last_turn_only else checked
        checked = without_greeting(checked, place, what)
        check_replies(checked, place, what)
        return checked

    def _system(self, record: dict[str, Any], messages: list[Any], place: str) -> list[Message]:
        value = record.get(self.system) if self.system else None
        if value is None or value == "":
            return []
        value = _text_of(value, place, self.system)
        first = messages[0] if messages else None
        if isinstance(first, dict) and first.get("role") == "system":
            if first.get("content") == value:
                return []
            raise ConfigurationError(
                f"{place}: the field {self.system!r} and the first message are both system prompts; keep one of them."
            )
        return [{"role": "system", "content": value}]

    def _history(self, record: dict[str, Any], place: str) -> Iterator[Message]:
        pairs = record.get(self.history) if self.history else None
        if isinstance(pairs, str) and pairs.strip():
            pairs = _json(pairs, place, self.history)
        if not pairs:
            return
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair) for pair in pairs
        ):
            raise ConfigurationError(f"{place}: the field {self.history!r} must be a list of [question, answer] pairs.")
        for question, answer in pairs:
            yield {"role": "user", "content": question}
            yield {"role": "assistant", "content": answer, "weight": 0}  # only the answer field is learnt

    def _question(self, record: dict[str, Any], place: str) -> list[Message]:
        first, *more = self.question
        value = record[first]
        if isinstance(value, list):  # TRL's format: the messages before the answer, none of them learnt
            if about := next((name for name in more if record.get(name)), None):
                raise ConfigurationError(
                    f"{place}: the field {first!r} is a list of messages, so {about!r} would be ignored; add it to the "
                    "messages."
                )
            asked = _conversation(value, place, f"the field {first!r}")
            replies = [isinstance(each, dict) and each.get("role") == "assistant" for each in asked]
            return [{**each, "weight": 0} if reply else each for each, reply in zip(asked, replies, strict=True)]
        parts = []
        for name in self.question:
            value = record.get(name)
            if value is not None and value != "":
                parts.append(_text_of(value, place, name))
        if not any(part.strip() for part in parts):
            raise ConfigurationError(
                f"{place}: the question ({', '.join(self.question)}) is empty, so the answer would be learnt without "
                "one; fill it in, or leave the record out."
            )
        return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]

    def _answer(self, record: dict[str, Any], place: str) -> list[Message]:
        assert self.answer is not None
        value = record[self.answer]
        thought = record.get(self.reasoning) if self.reasoning else None
        if isinstance(value, list):
            said = _conversation(value, place, f"the field {self.answer!r}")
        else:
            said = [{"role": "assistant", "content": _text_of(value, place, self.answer)}]
        if thought is not None and thought != "":
            said[-1] = {**said[-1], REASONING[0]: _text_of(thought, place, self.reasoning)}
        return said


def _conversation(value: Any, place: str, what: str) -> Any:
    """Convert messages of any supported form to those with a role; anything else is left to be refused later."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # columnar files store varying structures as JSON text
        value = _json(value, place, what)
    if not isinstance(value, list):
        return value
    return [_message(each, place, number, what) for number, each in enumerate(value, start=1)]


def _message(message: Any, place: str, number: int, what: str) -> Any:
    """Convert ShareGPT's from and value to role and content; converted datasets may mix both pairs of names."""
    if not isinstance(message, dict):
        return message
    speaker, value = message.get("from"), message.get("value")
    if not isinstance(speaker, str) and value is None:
        return message
    if message.get("content") is not None and value is not None:
        raise ConfigurationError(
            f"{place}: message {number} of {what} has both a value and a content; keep one of them."
        )
    if message.get("role") is not None and speaker is not None and message["role"] not in (speaker, ROLES.get(speaker)):
        raise ConfigurationError(
            f"{place}: message {number} of {what} has a role and a different from; keep one of them."
        )
    rest = {key: each for key, each in message.items() if key not in ("from", "value", "role", "content")}
    role, content = message.get("role"), message.get("content")
    if speaker == "function_call" and isinstance(value, str):
        return {"role": "assistant", "content": "", **rest, "tool_calls": _calls(value, place, number, what)}
    role = ROLES.get(speaker.lower(), speaker) if isinstance(speaker, str) else role
    return {"role": role, "content": content if value is None else value, **rest}


def _calls(value: str, place: str, number: int, what: str) -> list[dict[str, Any]]:
    calls = _json(value, place, f"message {number} of {what}")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ConfigurationError(f"{place}: message {number} of {what} calls a function without a name; correct it.")
    made = []
    for call in calls:
        arguments = [key for key in ("arguments", "parameters") if key in call]
        other = next((key for key in call if key not in ("name", "id", *arguments[:1])), None)
        if other is not None:
            raise ConfigurationError(
                f"{place}: message {number} of {what} calls a function with {other!r}; a call may only have a name, "
                "arguments and an id, so move it there or remove it."
            )
        function = {"name": call["name"], "arguments": call[arguments[0]] if arguments else {}}
        made.append({"type": "function", "function": function, **({"id": call["id"]} if call.get("id") else {})})
    return made


def _text_of(value: Any, place: str, name: str | None) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{place}: the field {name!r} must be a string, not {type(value).__name__}.")
    return value


def _json(value: str, place: str, what: str | None) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{place}: {what} is text, but not valid JSON ({error}); correct it.") from None
