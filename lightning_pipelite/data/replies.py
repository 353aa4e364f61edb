"""Determines which replies of a conversation are learnt: those that answer a question and are not empty."""

from __future__ import annotations

from lightning_pipelite.data.conversation import REASONING, Message, learnt
from lightning_pipelite.errors import ConfigurationError

_ASKS_NOTHING = ("assistant", "system", "developer", "tool", "function")  # any other role asks questions


def last_turn(messages: list[Message]) -> list[Message]:
    """Give the assistant's messages before the last question a weight of 0."""
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return [
        {**message, "weight": 0} if number < last and message["role"] == "assistant" else message
        for number, message in enumerate(messages)
    ]


def without_greeting(messages: list[Message], place: str, what: str) -> list[Message]:
    """Give the assistant's greeting, before anything is asked, a weight of 0.

    Raises:
        ConfigurationError: If a reply would be learnt without a question: the question is empty, or there is none.
    """
    made: list[Message] = []
    asked: bool | None = None  # whether the last question says anything; None before there is one
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in _ASKS_NOTHING:
            asked = _says(message) or (bool(asked) and before == role)  # a question may span several messages
        elif learnt(message) and not asked:
            if asked is None and message.get("weight") is None:
                message = {**message, "weight": 0}
            else:
                where = "precedes the first question" if asked is None else "answers an empty question"
                raise ConfigurationError(
                    f"{place}: the reply in message {number} of {what} {where}, and would be learnt without one; give "
                    "it a question or a weight of 0, or leave the record out."
                )
        made.append(message)
        before = role
    if any(map(learnt, messages)) and not any(map(learnt, made)):
        raise ConfigurationError(
            f"{place}: {what} has no question before the assistant's reply, which would be learnt without one; add a "
            "user message, or leave the record out."
        )
    return made


def check_replies(messages: list[Message], place: str, what: str) -> None:
    """Refuse empty replies that would be learnt: the model would learn to end its turn at once.

    Raises:
        ConfigurationError: If there is one.
    """
    for number, message in enumerate(messages, start=1):
        if not learnt(message) or any(message.get(key) for key in ("tool_calls", "function_call", *REASONING)):
            continue
        if not _says(message):
            raise ConfigurationError(
                f"{place}: the reply in message {number} of {what} is empty; fill it in, give it a weight of 0, or "
                "leave the record out."
            )


def _says(message: Message) -> bool:
    content = message["content"]
    texts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    return any(text.strip() for text in texts)
