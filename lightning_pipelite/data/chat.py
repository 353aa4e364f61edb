"""Conversations as token ids, rendered with a chat template."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from tokenizers import Tokenizer

from lightning_pipelite.data.conversation import Message, learnt
from lightning_pipelite.data.record_errors import naming
from lightning_pipelite.data.template import ChatTemplate, Span
from lightning_pipelite.data.templates import no_template
from lightning_pipelite.data.turns import Turns
from lightning_pipelite.errors import ConfigurationError

Flags = npt.NDArray[np.bool_]


class ChatRenderer:
    """Renders conversations and determines which tokens are the assistant's.

    If the template marks the assistant's words with ``{% generation %}``, those marks are used. Otherwise a
    conversation is rendered up to each assistant turn, with and without that turn: whatever the turn adds after the
    generation prompt is the assistant's, including the end-of-turn token. If a template renders a turn differently when
    others follow (some then omit the reasoning), the turn's content is located in the full conversation instead, and a
    special token directly after it counts as the end-of-turn token. Replies with a weight of 0 are not learnt.

    Args:
        tokenizer: A fast tokenizer of `transformers`, loaded without options that change its behaviour.
        name: Its directory, for errors.

    Raises:
        ConfigurationError: If the tokenizer has no tokenizer.json or no chat template.
    """

    def __init__(self, tokenizer: Any, name: object) -> None:
        self._tokenizer = tokenizer
        self._name = name
        if not tokenizer.is_fast:
            raise ConfigurationError(
                f"The tokenizer of {name} has no tokenizer.json, which conversations need: add it."
            )
        if not tokenizer.chat_template:
            raise no_template(name)
        self._templates: dict[bool, ChatTemplate] = {}
        self._template({})
        self._special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._places = _with_whole_offsets(tokenizer)

    def encode(
        self,
        messages: list[Message],
        place: str,
        arguments: dict[str, Any] | None = None,
        others: tuple[str, ...] = (),
        passed_over: set[str] | None = None,
    ) -> tuple[list[int], Flags]:
        """Render and tokenise a conversation.

        Args:
            messages: The messages, each with a ``role``.
            place: Location of the conversation, for errors.
            arguments: Arguments for `apply_chat_template`, such as ``tools``.
            others: The record's other keys.
            passed_over: Set to which the names of what the template does not show are added.

        Returns:
            The token ids, as `apply_chat_template` yields them, and a mask of the same length that is true for tokens
            to be learnt.

        Raises:
            ConfigurationError: If the template refuses the conversation or omits part of it, if the assistant's words
                cannot be identified, or if there is nothing to learn.
        """
        arguments = arguments or {}
        replies = [number for number, message in enumerate(messages) if learnt(message)]
        template = self._template(arguments)
        with naming(place, "the chat template rejects the conversation"):
            template.check_roles(messages, place)
            shown = [
                {key: value for key, value in message.items() if key != "weight" and value is not None}
                for message in template.plain(messages, place)
            ]
            all_are_learnt = len(replies) == sum(message["role"] == "assistant" for message in messages)
            marked: list[Span] = []
            if template.marks:
                text, marked = template.render_marked(shown, arguments)
            else:
                text = template.render(shown, arguments)
            unused = template.check_arguments(shown, arguments, others, text, place)
            unused |= template.check_messages(shown, arguments, text, place)
            if template.marks:
                if not all_are_learnt:
                    marked = self._marked_of(template, shown, arguments, replies, marked, place)
                spans = [(begin, end, True) for begin, end in marked]
            else:
                turns = Turns(template, shown, arguments, text)
                spans = [turns.span(number, place) for number in replies]
        with naming(place, "the tokenizer rejects the conversation"):
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            offsets = self._offsets(text)
        if len(offsets) != len(ids):
            raise ConfigurationError(
                f"{place}: the tokenizer of {self._name} does not report where its tokens are in the text; use another."
            )
        said = np.zeros(len(ids), bool)
        starts, ends = offsets[:, 0], offsets[:, 1]
        for begin, end, has_mark in spans:
            # A token that begins before the reply counts: a space at the end of the prompt may be part of it.
            said |= (starts < end) & (ends > begin)
            behind = int(np.searchsorted(starts, end))
            if not has_mark and behind < len(ids) and ids[behind] in self._special:
                said[behind] = True
        if not said.any():
            reason = (
                "the chat template attributes no token to the assistant" if replies else "no reply has a weight above 0"
            )
            raise ConfigurationError(
                f"{place}: {reason}, so there is nothing to learn; correct the conversation or the template."
            )
        if passed_over is not None:
            passed_over |= unused
        return ids, said

    def _template(self, arguments: dict[str, Any]) -> ChatTemplate:
        """Return the template; some tokenizers have a separate one for conversations with tools."""
        tools = arguments.get("tools")
        if (tools is not None) not in self._templates:
            try:
                source = self._tokenizer.get_chat_template(tools=tools)
            except ValueError as error:  # several named templates, none of them the default
                raise ConfigurationError(
                    f"The tokenizer of {self._name} has no default chat template: {error}"
                ) from error
            try:
                self._templates[tools is not None] = ChatTemplate(self._tokenizer, source)
            except TemplateError as error:
                raise ConfigurationError(
                    f"The chat template of {self._name} is invalid ({error}); correct it."
                ) from error
        return self._templates[tools is not None]

    def _offsets(self, text: str) -> npt.NDArray[np.int64]:
        if self._places is None:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = encoded["offset_mapping"]
        else:
            offsets = self._places.encode(text, add_special_tokens=False).offsets
        return np.asarray(offsets, np.int64).reshape(-1, 2)

    @staticmethod
    def _marked_of(
        template: ChatTemplate,
        messages: list[Message],
        arguments: dict[str, Any],
        replies: list[int],
        marked: list[Span],
        place: str,
    ) -> list[Span]:
        """Return the marked spans that belong to the messages in ``replies``."""
        counts = [0]
        for end in range(1, len(messages) + 1):
            counts.append(len(template.render_marked(messages[:end], arguments)[1]))
        own = [counts[number + 1] - counts[number] for number in range(len(messages))]
        of_others = any(count and message["role"] != "assistant" for count, message in zip(own, messages, strict=True))
        if counts[-1] != len(marked) or min(own) < 0 or of_others:
            raise ConfigurationError(
                f"{place}: the words that the chat template marks cannot be matched to individual replies, so a reply "
                "with a weight of 0 cannot be excluded; leave such conversations out, or use a template without "
                "{% generation %}."
            )
        return [span for number in replies for span in marked[counts[number] : counts[number + 1]]]


def _with_whole_offsets(tokenizer: Any) -> Tokenizer | None:
    """Return a copy whose offsets include spaces, or None if the tokenizer does not trim its offsets.

    The ByteLevel and Roberta post-processors trim spaces from offsets, for extractive question answering. A token that
    consists only of spaces would then get an empty span after its actual position, on the wrong side of a turn's end.
    """
    backend = tokenizer.backend_tokenizer
    if '"trim_offsets":true' not in backend.to_str():
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    copy.no_truncation()
    copy.no_padding()
    return copy
