"""Which tokens of a conversation are the assistant's, for templates of different kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tokens import OPTIONS
from transformers import PreTrainedTokenizerFast

from chat_templates import CHATML, MARKED, THINKING
from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who are you"},
    {"role": "assistant", "content": "a name and the rest"},
    {"role": "user", "content": "a name and the rest"},
    {"role": "assistant", "content": "so it is"},
]


@pytest.fixture
def make(make_tokenizer: Callable[..., Path]) -> Callable[[str | None], tuple[DocumentTokenizer, Any]]:
    def build(template: str | None) -> tuple[DocumentTokenizer, Any]:
        folder = make_tokenizer({"bos_token": "<s>", "eos_token": "<|im_end|>"})
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        options = replace(OPTIONS, datasets=[DatasetConfig("x", messages_field="messages")])
        return DocumentTokenizer(folder, options), tokenizer

    return build


def said(template: str, make: Any, messages: list[dict[str, str]] = TALK) -> tuple[str, list[str]]:
    """Return the whole text, and the pieces of it that are labels."""
    ours, tokenizer = make(template)
    ids, flags = ours.encode_conversation(messages, "here")
    pieces: list[list[int]] = []
    for number, (token, flag) in enumerate(zip(ids, flags, strict=True)):
        if flag:
            if number == 0 or not flags[number - 1]:
                pieces.append([])
            pieces[-1].append(token)
    assert ours.sequence_prefix == []
    return tokenizer.decode(ids), [tokenizer.decode(piece) for piece in pieces]


def test_replies_with_the_mark_that_ends_them(make: Any) -> None:
    text, pieces = said(CHATML, make)
    assert text == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert pieces == ["a name and the rest<|im_end|>\n", "so it is<|im_end|>\n"]


def test_a_template_that_marks_replies_itself(make: Any) -> None:
    _, pieces = said(MARKED, make)
    assert pieces == ["a name and the rest<|im_end|>", "so it is<|im_end|>"]


def test_a_template_that_renders_the_last_reply_otherwise(make: Any) -> None:
    text, pieces = said(THINKING, make)
    assert text.count("[think]") == 1
    assert pieces == ["a name and the rest<|im_end|>", "[think][/think]so it is<|im_end|>\n"]


def test_conversation_that_begins_with_a_reply(make: Any) -> None:
    _, pieces = said(CHATML, make, TALK[2:])
    assert pieces == ["a name and the rest<|im_end|>\n", "so it is<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", r"here: the chat template rejects .*no system message"),
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}{{ messages | length }}",
            "here: .* does not render message 1",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}{{ messages | length }}",
            "here: the assistant's words cannot be located in message 3",
        ),
        (MARKED.replace("'assistant'", "'nobody'"), "here: the chat template attributes no token to the assistant"),
    ],
)
def test_templates_that_do_not_tell(make: Any, template: str, message: str) -> None:
    ours, _ = make(template)
    with pytest.raises(ConfigurationError, match=message):
        ours.encode_conversation(TALK, "here")


def test_no_template(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"has no chat template, which conversations need"):
        make(None)
