"""Handles conversations that are longer than a sequence."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lightning_pipelite.data.chat import Flags
from lightning_pipelite.data.config import LongConversations
from lightning_pipelite.data.conversation import Message, learnt
from lightning_pipelite.data.records import Record
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.shared.wording import counted

Encoded = tuple[list[int], Flags]


@dataclass
class Long:
    """Counts of conversations that are longer than a sequence, and how they were handled.

    Args:
        limit: Document tokens that a sequence has room for.
        conversations: Conversations that are longer.
        dropped: Those that were left out.
        parts: Parts that others were cut into, before questions.
        cut: Answers that were cut off at the end of a sequence.
        unanswered: Questions that fill a sequence on their own, left out with their answers.
        kept: Conversations that continue in the next sequence.
    """

    limit: int = 0
    conversations: int = 0
    dropped: int = 0
    parts: int = 0
    cut: int = 0
    unanswered: int = 0
    kept: int = 0

    def add(self, other: Long) -> None:
        """Add the counts of ``other``."""
        for each in fields(self)[1:]:
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.limit = max(self.limit, other.limit)

    def __str__(self) -> str:
        """Return a summary as part of a line; empty if there are none."""
        if not self.conversations:
            return ""
        what = [
            f"{self.dropped:,} dropped" if self.dropped else "",
            f"split into {counted(self.parts, 'part')}, each with its questions" if self.parts else "",
            f"{counted(self.cut, 'answer')} truncated" if self.cut else "",
            f"{counted(self.unanswered, 'question')} left out, too long for any answer" if self.unanswered else "",
            f"{self.kept:,} continue in the next sequence without their question" if self.kept else "",
        ]
        told = "; ".join(each for each in what if each)
        return f"{counted(self.conversations, 'conversation')} longer than {counted(self.limit, 'token')} ({told})"


class Cutter:
    """Encodes conversations, and cuts those that are longer than a sequence.

    Args:
        tokenizer: Encodes them.
        limit: Document tokens that a sequence has room for.
        way: How to handle longer ones; see ``long_conversations`` of `PackedDataModule`.
    """

    def __init__(self, tokenizer: DocumentTokenizer, limit: int, way: LongConversations) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._way = way

    def encode(self, record: Record, passed_over: set[str], counts: Long) -> list[Encoded]:
        """Encode a conversation, in as many parts as needed; none if it is dropped.

        Args:
            record: A record with a conversation.
            passed_over: See `DocumentTokenizer.encode_conversation`.
            counts: Updated with how the conversation was handled, if it is long.

        Raises:
            ConfigurationError: If it cannot be encoded.
        """
        assert not isinstance(record.document, str)
        whole = self._tokens(record, record.document, passed_over)
        if len(whole[0]) <= self._limit:
            return [whole]
        counts.limit = self._limit
        counts.conversations += 1
        if self._way == "drop":
            counts.dropped += 1
            return []
        if self._way == "keep":
            counts.kept += 1
            return [whole]
        return self._split(record, record.document, counts)

    def _split(self, record: Record, messages: list[Message], counts: Long) -> list[Encoded]:
        """Cut off as many exchanges as fit, from the end, so that the last answer keeps as much context as possible."""
        head, exchanges = _exchanges(messages)
        parts: list[Encoded] = []
        stop = len(exchanges)
        while stop:
            part = None
            for start in range(stop - 1, -1, -1):
                said = [*head, *(message for exchange in exchanges[start:stop] for message in exchange)]
                if not any(map(learnt, said)):
                    continue
                tokens = self._tokens(record, said, set())
                if len(tokens[0]) > self._limit:
                    break
                part, begin = tokens, start
            else:
                start = -1  # all that is left fits, or has nothing to learn
            if part is not None:
                parts.append(part)
                stop = begin
            elif start < stop - 1:  # the exchanges after `start` have nothing to learn, so they are left out
                stop = start + 1
            else:  # an exchange that is too long on its own
                ids, flags = tokens
                if flags[: self._limit].any():
                    counts.cut += 1
                    parts.append((ids[: self._limit], flags[: self._limit]))
                else:
                    counts.unanswered += 1
                stop -= 1
        counts.parts += len(parts)
        return parts[::-1]

    def _tokens(self, record: Record, messages: list[Message], passed_over: set[str]) -> Encoded:
        return self._tokenizer.encode_conversation(messages, record.place, record.arguments, record.others, passed_over)


def _exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the system messages at the start, and the exchanges, each of which begins with a question."""
    first = next((n for n, each in enumerate(messages) if each["role"] not in ("system", "developer")), 0)
    exchanges: list[list[Message]] = []
    for message in messages[first:]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return messages[:first], exchanges
