"""Locates the assistant's turns in a rendered conversation, for templates that do not mark them."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from lightning_pipelite.data.conversation import REASONING, Message
from lightning_pipelite.data.template import MARKER, ChatTemplate, with_calls
from lightning_pipelite.errors import ConfigurationError


class Turns:
    """Locates the assistant's turns in a rendered conversation.

    Args:
        template: The template that rendered it.
        messages: All its messages.
        arguments: Arguments for `apply_chat_template`.
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
        """Return a message without the parts that the template omits when other messages follow."""
        message = self._messages[number]
        without = {key: value for key, value in message.items() if key not in REASONING}
        if message.get("tool_calls") and message.get("content"):
            without["content"] = ""
        return without if without != message and self._whole(number, without) == self._text else message

    def span(self, number: int, place: str) -> tuple[int, int, bool]:
        """Return the begin and end of a turn, and whether they include the mark that ends it.

        The span is empty for a reply at the start of the conversation if the template cannot render a prompt for it.

        Args:
            number: Index of the message.
            place: Location of the conversation, for errors.

        Raises:
            ConfigurationError: If the turn cannot be located.
        """
        if number == 0 and self._prompt(0) is None:
            return 0, 0, True
        return self._turn(number) or self._content(number, place)

    def _turn(self, number: int) -> tuple[int, int, bool] | None:
        """Return the span of a turn if it is rendered as it would be at the end of a conversation, else None."""
        before = self._prompt(number)
        until = self._render(self._messages[: number + 1])
        if before is None or until is None or not until.startswith(before):  # a template may refuse to end there
            return None
        if self._text.startswith(until):
            return len(before), len(until), True
        begin = self._found(number, before, until)
        return None if begin is None else (begin, begin + len(until) - len(before), True)

    def _found(self, number: int, before: str, until: str) -> int | None:
        """Return where a turn begins that is rendered as at the end, although messages before it are not; else None.

        This happens if a template shows the tools with the last question. A marker in the turn's place locates it.
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
        """Return the span of a turn's content: the text that changes if a marker replaces all that the turn says."""
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
            f"{place}: the assistant's words cannot be located in message {number + 1} as the chat template renders "
            "it; use a template with {% generation %} marks."
        )

    def _behind_prompt(self, number: int, begin: int) -> int:
        """Return where the model begins to generate: some templates name a channel before the turn's words."""
        prompt = self._prompt(number)
        return len(prompt) if prompt is not None and self._text[:begin].startswith(prompt) else begin

    def _prompt(self, number: int) -> str | None:
        """Return the prompt from which the model generates a message."""
        return self._render(self._messages[:number], prompt=True)

    def _whole(self, number: int, message: Message) -> str | None:
        """Return the rendered conversation with one message replaced."""
        return self._render([*self._messages[:number], message, *self._messages[number + 1 :]])

    def _render(self, messages: list[Message], prompt: bool = False) -> str | None:
        try:
            return self._template.render(messages, self._arguments, prompt)
        except (TemplateError, TypeError, KeyError, ValueError):  # the template may refuse a trial
            return None


def _with_content(message: Message) -> Message:
    return {**message, "content": MARKER}
