"""Where the assistant's turns are in a conversation, for templates that do not mark them."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from lightning_pipelite.data.conversation import REASONING, Message
from lightning_pipelite.data.template import MARKER, ChatTemplate, with_calls
from lightning_pipelite.errors import ConfigurationError


class Turns:
    """Where the assistant's turns are in a rendered conversation.

    Args:
        template: What rendered it.
        messages: All of it.
        arguments: Of `apply_chat_template`.
        text: The rendered conversation.
    """

    def __init__(self, template: ChatTemplate, messages: list[Message], arguments: dict[str, Any], text: str) -> None:
        self._template = template
        self._arguments = arguments
        self._text = text
        self._messages = messages
        said = [self._said(number) for number in range(len(messages))]
        if said != messages and self._render(said) == text:
            self._messages = said

    def _said(self, number: int) -> Message:
        """Return a message without what the template leaves out of it where others follow."""
        message = self._messages[number]
        without = {key: value for key, value in message.items() if key not in REASONING}
        if message.get("tool_calls") and message.get("content"):
            without["content"] = ""
        return without if without != message and self._whole(number, without) == self._text else message

    def span(self, number: int, place: str) -> tuple[int, int, bool]:
        """Give where a turn begins and ends, and whether the mark that ends it is within.

        It is empty for a reply that begins the conversation, if the template does not tell how such a one begins.

        Args:
            number: Of the message.
            place: Where the conversation stands, for errors.

        Raises:
            ConfigurationError: If the template does not let it be told.
        """
        if number == 0 and self._prompt(0) is None:
            return 0, 0, True
        return self._turn(number) or self._content(number, place)

    def _turn(self, number: int) -> tuple[int, int, bool] | None:
        """If it is rendered as the last one would be."""
        before = self._prompt(number)
        until = self._render(self._messages[: number + 1])
        if before is None or until is None or not until.startswith(before):  # it may refuse to end there
            return None
        if self._text.startswith(until):
            return len(before), len(until), True
        begin = self._found(number, before, until)
        return None if begin is None else (begin, begin + len(until) - len(before), True)

    def _found(self, number: int, before: str, until: str) -> int | None:
        """Where a turn begins that is as the last one, behind others that are not as they are without what follows.

        So it is where a template shows tools with the last question. A word in the turn's place tells where that is.
        """
        message = self._messages[number]
        for other in (_with_content(message), with_calls(message)):
            last = self._render([*self._messages[:number], other])
            whole = self._whole(number, other)
            if (
                last is None
                or whole is None
                or not last.startswith(before)
                or MARKER not in last
                or MARKER not in whole
            ):
                continue
            begin = whole.index(MARKER) - last.index(MARKER) + len(before)
            if begin >= 0 and whole.startswith(last[len(before) :], begin) and whole[:begin] == self._text[:begin]:
                return begin if self._text.startswith(until[len(before) :], begin) else None
        return None

    def _content(self, number: int, place: str) -> tuple[int, int, bool]:
        """Return what does not stay the same with another content in the place of all that it says is it."""
        text, message = self._text, self._messages[number]
        bare = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call", *REASONING)}
        every = with_calls({**message, **{key: MARKER for key in REASONING if message.get(key)}})
        for other in (_with_content(bare), _with_content(every)):
            changed = self._whole(number, other)
            if changed is None or changed.count(MARKER) != 1:
                continue
            before, _, behind = changed.partition(MARKER)
            end = len(text) - len(behind)
            if text.startswith(before) and text.endswith(behind) and len(before) < end + (not message.get("content")):
                return self._behind_prompt(number, len(before)), end, False
        raise ConfigurationError(
            f"{place}: the chat template renders message {number + 1} so that the assistant's words cannot be told "
            "apart; use a template with {% generation %} marks."
        )

    def _behind_prompt(self, number: int, begin: int) -> int:
        """Where the model begins to write, if that is before its words: some templates name a channel in between."""
        prompt = self._prompt(number)
        return len(prompt) if prompt is not None and self._text[:begin].startswith(prompt) else begin

    def _prompt(self, number: int) -> str | None:
        """Return what the model is given to write a message."""
        return self._render(self._messages[:number], prompt=True)

    def _whole(self, number: int, message: Message) -> str | None:
        """Return the conversation with another message in a place."""
        return self._render([*self._messages[:number], message, *self._messages[number + 1 :]])

    def _render(self, messages: list[Message], prompt: bool = False) -> str | None:
        try:
            return self._template.render(messages, self._arguments, prompt)
        except (TemplateError, TypeError, KeyError, ValueError):  # of what is only tried
            return None


def _with_content(message: Message) -> Message:
    return {**message, "content": MARKER}
