"""Conversations as token ids, by the tokenizer's own chat template."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from lightning_pipelite.errors import ConfigurationError

Message = dict[str, Any]
Flags = npt.NDArray[np.bool_]


class ChatRenderer:
    """Renders conversations, and tells which tokens the assistant said.

    A template that marks the assistant's words with ``{% generation %}`` says so itself. Otherwise a conversation is
    rendered up to each of the assistant's turns, with and without that turn: what the turn adds behind the prompt for
    a reply is the assistant's, the mark that ends the turn included. Where a template renders a turn otherwise when
    others follow (some then leave the reasoning out), the turn's content is looked for in the whole conversation
    instead, and a special token right behind it counts as the mark.

    Args:
        tokenizer: A fast tokenizer of `transformers`.
        name: Its directory, for errors.

    Raises:
        ConfigurationError: If the tokenizer has no chat template or no offsets.
    """

    def __init__(self, tokenizer: Any, name: object) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise ConfigurationError(
                f"The tokenizer of {name} has no tokenizer.json, which conversations need: add it."
            )
        if not tokenizer.chat_template:
            raise ConfigurationError(
                f"The tokenizer of {name} has no chat template, which messages_field needs: put a chat_template.jinja "
                "there, or use an instruction-tuned model's tokenizer."
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:  # several named ones, none the default
            raise ConfigurationError(f"The tokenizer of {name} has no default chat template: {error}") from error
        self._special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._marks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def encode(self, messages: list[Message], place: str) -> tuple[list[int], Flags]:
        """Render and tokenise a conversation.

        Args:
            messages: Each with a ``role``.
            place: Where it stands, for errors.

        Returns:
            The ids, and of the same length which of them are the assistant's.

        Raises:
            ConfigurationError: If the template refuses it, or does not tell which words are the assistant's.
        """
        try:
            if self._marks:
                encoded = self._tokenizer.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask=True
                )
                return self._checked(encoded["input_ids"], np.asarray(encoded["assistant_masks"], bool), place)
            text = self._render(messages)
            spans = [
                self._turn(messages, number, text) or self._content(messages, number, text, place)
                for number, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        except ConfigurationError:
            raise
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ConfigurationError(
                f"{place}: the chat template refuses the conversation ({error}); correct it."
            ) from error
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        starts = np.asarray([start for start, _ in encoded["offset_mapping"]], np.int64)
        said = np.zeros(len(starts), bool)
        for begin, end, has_mark in spans:
            said |= (starts >= begin) & (starts < end)
            behind = int(np.searchsorted(starts, end))
            if not has_mark and behind < len(ids) and ids[behind] in self._special:
                said[behind] = True
        return self._checked(ids, said, place)

    @staticmethod
    def _checked(ids: list[int], said: Flags, place: str) -> tuple[list[int], Flags]:
        if not said.any():
            raise ConfigurationError(
                f"{place}: by the chat template, no token is the assistant's, so there is nothing to learn; correct "
                "the conversation or the template."
            )
        return ids, said

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _turn(self, messages: list[Message], number: int, text: str) -> tuple[int, int, bool] | None:
        """Where a turn begins and ends, if it is rendered as the last one would be."""
        before = self._render(messages[:number], prompt=True) if number else ""
        until = self._render(messages[: number + 1])
        return (len(before), len(until), True) if text.startswith(until) and until.startswith(before) else None

    def _content(self, messages: list[Message], number: int, text: str, place: str) -> tuple[int, int, bool]:
        """Where a turn's content begins and ends: what stays the same with another content in its place is not it."""
        marker = "QZJXKVWQ"
        changed = self._render([*messages[:number], {**messages[number], "content": marker}, *messages[number + 1 :]])
        before, _, behind = changed.partition(marker)
        end = len(text) - len(behind)
        if changed.count(marker) != 1 or not (text.startswith(before) and text.endswith(behind) and len(before) < end):
            raise ConfigurationError(
                f"{place}: the chat template renders message {number + 1} so that the assistant's words cannot be told "
                "apart; use a template with {% generation %} marks."
            )
        return len(before), end, False
