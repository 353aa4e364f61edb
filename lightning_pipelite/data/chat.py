"""Conversations as token ids, by the tokenizer's own chat template."""

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
    """Renders conversations, and tells which tokens the assistant said.

    A template that marks the assistant's words with ``{% generation %}`` says so itself. Otherwise a conversation is
    rendered up to each of the assistant's turns, with and without that turn: what the turn adds behind the prompt for
    a reply is the assistant's, the mark that ends the turn included. Where a template renders a turn otherwise when
    others follow (some then leave the reasoning out), the turn's content is looked for in the whole conversation
    instead, and a special token right behind it counts as the mark. Replies with a weight of 0 are not learnt.

    Args:
        tokenizer: A fast tokenizer of `transformers`, loaded without options that change what it does.
        name: Its directory, for errors.

    Raises:
        ConfigurationError: If the tokenizer has no chat template or no offsets.
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
            messages: Each with a ``role``.
            place: Where it stands, for errors.
            arguments: Of `apply_chat_template`, such as ``tools``.
            others: Other keys of the record.
            passed_over: Gets the names of what the record has and the template does not show.

        Returns:
            The ids, those of `apply_chat_template`, and of the same length which of them are to be learnt.

        Raises:
            ConfigurationError: If the template refuses it, passes over what it says, or does not tell which words are
                the assistant's.
        """
        arguments = arguments or {}
        replies = [number for number, message in enumerate(messages) if learnt(message)]
        template = self._template(arguments)
        with naming(place, "the chat template refuses the conversation"):
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
        with naming(place, "the tokenizer refuses the conversation"):
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            offsets = self._offsets(text)
        if len(offsets) != len(ids):
            raise ConfigurationError(
                f"{place}: the tokenizer of {self._name} does not tell where in the text its tokens are; use another."
            )
        said = np.zeros(len(ids), bool)
        starts, ends = offsets[:, 0], offsets[:, 1]
        for begin, end, has_mark in spans:
            # A token that begins before the reply counts: where a prompt ends with a space, it is the first word.
            said |= (starts < end) & (ends > begin)
            behind = int(np.searchsorted(starts, end))
            if not has_mark and behind < len(ids) and ids[behind] in self._special:
                said[behind] = True
        if not said.any():
            reason = "by the chat template, no token is the assistant's" if replies else "no reply has a weight above 0"
            raise ConfigurationError(
                f"{place}: {reason}, so there is nothing to learn; correct the conversation or the template."
            )
        if passed_over is not None:
            passed_over |= unused
        return ids, said

    def _template(self, arguments: dict[str, Any]) -> ChatTemplate:
        """Return the template, of which some tokenizers have one of its own for conversations with tools."""
        tools = arguments.get("tools")
        if (tools is not None) not in self._templates:
            try:
                source = self._tokenizer.get_chat_template(tools=tools)
            except ValueError as error:  # several named ones, none the default
                raise ConfigurationError(
                    f"The tokenizer of {self._name} has no default chat template: {error}"
                ) from error
            try:
                self._templates[tools is not None] = ChatTemplate(self._tokenizer, source)
            except TemplateError as error:
                raise ConfigurationError(f"The chat template of {self._name} is none ({error}); correct it.") from error
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
        """Return the marked parts that belong to some of the messages."""
        counts = [0]
        for end in range(1, len(messages) + 1):
            counts.append(len(template.render_marked(messages[:end], arguments)[1]))
        own = [counts[number + 1] - counts[number] for number in range(len(messages))]
        of_others = any(count and message["role"] != "assistant" for count, message in zip(own, messages, strict=True))
        if counts[-1] != len(marked) or min(own) < 0 or of_others:
            raise ConfigurationError(
                f"{place}: the chat template does not tell which of the marked words belong to a reply with a weight "
                "of 0; leave such conversations out, or use a template without {% generation %}."
            )
        return [span for number in replies for span in marked[counts[number] : counts[number + 1]]]


def _with_whole_offsets(tokenizer: Any) -> Tokenizer | None:
    """Return a copy that tells of spaces where they are, if the tokenizer takes them off the places of its tokens.

    ByteLevel and Roberta do that for their tasks of finding answers in texts. A token of spaces alone would then lie
    behind itself, on the wrong side of a turn's end.
    """
    backend = tokenizer.backend_tokenizer
    if '"trim_offsets":true' not in backend.to_str():
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    copy.no_truncation()
    copy.no_padding()
    return copy
