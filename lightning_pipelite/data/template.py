"""A tokenizer's chat template, with checks of what it shows of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, meta
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_pipelite.data.conversation import OTHER_ROLES, REASONING, Message
from lightning_pipelite.errors import ConfigurationError

MARKER = "QZJXKVWQ"
"""A word that occurs in no conversation."""

Span = tuple[int, int]

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message that must be shown; a template may omit others (an id, a name). Those in _OF_RECORDS usually belong
# to the record, so a template that reads them need not read them from messages.
_OF_RECORDS = ("tools", "functions", "documents")
_WORDS = (
    "tool_calls",
    "function_call",
    *REASONING,
    "images",
    "image",
    "audio",
    "audios",
    "videos",
    "video",
    *_OF_RECORDS,
)
# Other keys with numbers or booleans qualify a message, for example whether it is learnt.
_NUMBERS_THAT_SAY_NOTHING = ("id", "index", "timestamp", "created_at")
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


class ChatTemplate:
    """One chat template of a tokenizer.

    Args:
        tokenizer: A tokenizer of `transformers`.
        source: The template.

    Attributes:
        marks: Whether it marks the assistant's words with ``{% generation %}``.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._words = {*re.findall(r"\w+", source)}
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        self._variables = meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", source)))
        self.marks = _GENERATION.search(source) is not None
        self._reads_parts: bool | None = None
        self._shown: dict[str, bool] = {}

    def render(self, messages: list[Message], arguments: dict[str, Any], prompt: bool = False) -> str:
        """Render messages as text, followed by the generation prompt if `prompt`; the messages may be empty."""
        if not messages:  # apply_chat_template refuses an empty conversation
            given: dict[str, Any] = {**self._tokenizer.special_tokens_map, **arguments}
            texts, _ = render_jinja_template(
                conversations=[[]], chat_template=self._source, add_generation_prompt=prompt, **given
            )
            return str(texts[0])
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, chat_template=self._source, **arguments
        )

    def render_marked(self, messages: list[Message], arguments: dict[str, Any]) -> tuple[str, list[Span]]:
        """Return the text, and the spans that the template marks as the assistant's.

        `apply_chat_template` would return a token mask instead, which is wrong if a token's offsets exclude its leading
        or trailing spaces, as Llama 3's do.
        """
        given: dict[str, Any] = {**self._tokenizer.special_tokens_map, **arguments}
        texts, spans = render_jinja_template(
            conversations=[messages], chat_template=self._source, return_assistant_tokens_mask=True, **given
        )
        return texts[0], list(spans[0])

    # Checks of what the template shows

    def plain(self, messages: list[Message], place: str) -> list[Message]:
        """Return messages with their contents in the form that the template reads: text parts, or plain text.

        Raises:
            ConfigurationError: If the template does not read parts, and a message has several.
        """
        plain = []
        for number, message in enumerate(messages, start=1):
            content = message.get("content")
            if isinstance(content, list) and not self._takes_parts():
                if len(content) > 1:
                    raise ConfigurationError(
                        f"{place}: the content of message {number} has {len(content)} parts, but the chat template "
                        "does not read parts; join them into one string."
                    )
                message = {**message, "content": content[0]["text"]}
            plain.append(message)
        return plain

    def check_roles(self, messages: list[Message], place: str) -> None:
        """Refuse a role that is neither a common one nor one of the template's own.

        Raises:
            ConfigurationError: If there is one.
        """
        for number, message in enumerate(messages, start=1):
            role = message["role"]
            meant = OTHER_ROLES.get(role.lower())
            if role not in _ROLES and (meant or role not in self._words):
                raise ConfigurationError(
                    f"{place}: the role of message {number} is {role!r}; "
                    + (f"change it to {meant}." if meant else f"change it to one of {', '.join(_ROLES)}.")
                )

    def check_arguments(
        self, messages: list[Message], arguments: dict[str, Any], others: Iterable[str], text: str, place: str
    ) -> set[str]:
        """Refuse arguments in the record that the template ignores.

        Args:
            messages: The conversation.
            arguments: Arguments for `apply_chat_template`.
            others: The record's other keys.
            text: The rendered conversation.
            place: Location of the conversation, for errors.

        Returns:
            Names of keys that are ignored, but carry no content.

        Raises:
            ConfigurationError: If something with content is ignored, or a variable of the template is a key of the
                record outside of ``chat_template_kwargs``.
        """
        passed_over = {*others}
        special = {"messages", "add_generation_prompt", *self._tokenizer.special_tokens_map}
        for name in others:
            if name in self._variables - special:
                raise ConfigurationError(
                    f"{place}: the chat template reads {name!r}, but the record has it outside chat_template_kwargs; "
                    "move it there, or rename it."
                )
        for name, value in arguments.items():
            if name in ("tools", "documents"):
                without = {key: each for key, each in arguments.items() if key != name}
                if name not in self._variables or self._rendered(messages, without) == text:
                    raise ConfigurationError(
                        f"{place}: the chat template does not render the {name} of this conversation; use one that "
                        "does, or remove them."
                    )
            elif name not in self._variables and value:
                raise ConfigurationError(
                    f"{place}: the chat template does not read {name!r} of chat_template_kwargs; use one that does, "
                    "or remove it."
                )
            elif name not in self._variables:
                passed_over.add(f"chat_template_kwargs.{name}")
        return passed_over

    def check_messages(self, messages: list[Message], arguments: dict[str, Any], text: str, place: str) -> set[str]:
        """Refuse content of messages that the template ignores; otherwise like `check_arguments`."""
        passed_over = set()
        self._check_calls(messages, arguments, place)
        for number, message in enumerate(messages):
            for key, value in message.items():
                if (
                    isinstance(value, (bool, int, float))
                    and key not in _NUMBERS_THAT_SAY_NOTHING
                    and not self._shows(key, messages[: number + 1], arguments)
                ):
                    raise ConfigurationError(
                        f"{place}: message {number + 1} has a {key!r} of {value}, which the chat template does not "
                        "read; remove it, and use a weight of 0 or 1 to mark which replies are learnt."
                    )
                nothing = key in ("role", "content") or not message[key]
                if nothing or self._shows(key, messages[: number + 1], arguments):
                    continue
                if key in _WORDS:
                    raise ConfigurationError(
                        f"{place}: the chat template does not render the {key} of message {number + 1}; use one that "
                        "does, or remove them."
                    )
                passed_over.add(f"{key} of messages")
            content = message.get("content")
            words = content.strip() if isinstance(content, str) else ""
            if words and words not in text and not self._shows_content(number, messages, arguments, text):
                if not message.get("tool_calls"):
                    raise ConfigurationError(
                        f"{place}: the chat template does not render message {number + 1}, whose role is "
                        f"{message['role']}; use one that does, or remove the message."
                    )
                passed_over.add("content beside tool_calls")  # many templates omit it
            for call in message.get("tool_calls") or []:
                if _quoted_twice(call, text):
                    passed_over.add(
                        "the JSON structure of tool-call arguments (strings that the template quotes again)"
                    )
        return passed_over

    def _check_calls(self, messages: list[Message], arguments: dict[str, Any], place: str) -> None:
        """Refuse tool calls that are not shown: some templates show only a message's first, or none next to content."""
        for number, message in enumerate(messages):
            calls = range(len(message.get("tool_calls") or []))
            others = [*messages[:number], with_calls(message), *messages[number + 1 :]]
            text = self._rendered(others, arguments) if calls else None
            if text is not None and any(f"{MARKER}{call}." not in text for call in calls):
                raise ConfigurationError(
                    f"{place}: the chat template does not render all tool_calls of message {number + 1}; use one that "
                    "does, or remove them."
                )

    def _takes_parts(self) -> bool:
        if self._reads_parts is None:
            reply = {"role": "assistant", "content": "a"}
            text = self._rendered([{"role": "user", "content": [{"type": "text", "text": MARKER}]}, reply], {})
            self._reads_parts = text is not None and MARKER in text and re.search(r"['\"]type['\"]", text) is None
        return self._reads_parts

    def _shows(self, key: str, messages: list[Message], arguments: dict[str, Any]) -> bool:
        """Return whether the template shows a key that the last of these messages has."""
        # The excluded words may also refer to a key of the record or an option of the template.
        if key in self._words and key not in (*_OF_RECORDS, *REASONING):
            return True
        if key not in self._shown:  # some templates show every key of a message
            *before, last = messages
            without = [*before, {name: value for name, value in last.items() if name != key}]
            texts = [self._rendered(each, arguments) for each in (messages, without)]
            shown = None in texts or texts[0] != texts[1]
            if not shown and key in REASONING:  # it may be shown elsewhere, so this is not cached
                return False
            self._shown[key] = shown
        return self._shown[key]

    def _shows_content(self, number: int, messages: list[Message], arguments: dict[str, Any], text: str) -> bool:
        other = {**messages[number], "content": MARKER}
        rendered = self._rendered([*messages[:number], other, *messages[number + 1 :]], arguments)
        return rendered is None or MARKER in rendered or rendered != text

    def _rendered(self, messages: list[Message], arguments: dict[str, Any]) -> str | None:
        """Return the text, or None if the template refuses a conversation that is only tried."""
        try:
            return self.render(messages, arguments)
        except Exception:
            return None


def with_calls(message: Message) -> Message:
    """Return the message with the function names in its tool calls replaced: the first by `MARKER` and 0, and so on."""
    calls: list[dict[str, Any]] = []
    for number, call in enumerate(message.get("tool_calls") or []):
        function, name = call.get("function"), f"{MARKER}{number}."
        calls.append(
            {**call, "function": {**function, "name": name}} if isinstance(function, dict) else {**call, "name": name}
        )
    return {**message, "tool_calls": calls} if calls else message


def _quoted_twice(call: dict[str, Any], text: str) -> bool:
    function = call.get("function")
    arguments = (function if isinstance(function, dict) else call).get("arguments")
    return isinstance(arguments, str) and '"' in arguments and json.dumps(arguments, ensure_ascii=False) in text
