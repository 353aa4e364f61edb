"""A conversation's ids are those of the tokenizer's own `apply_chat_template`, whatever it does to spaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_tokens import OPTIONS
from transformers import AutoTokenizer

from chat_templates import CHATML, MARKED, THINKING
from chat_tokenizers import KINDS, write_tokenizer
from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.tokens import DocumentTokenizer

TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "thinking": THINKING,
    "llama": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "bos twice": (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
SAID = ["  Hi  there, Ünïcode ﬁ 🙂\n\n", "def f(x):\n    return x   ", "Hi"]
TALK = [
    message
    for said in SAID
    for message in ({"role": "user", "content": "  Hello  \n"}, {"role": "assistant", "content": said})
]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), kind, "")
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_labels(kind: str, tokenizer_of: Callable[[str], Path]) -> None:
    folder = tokenizer_of(kind)
    for name, template in TEMPLATES.items():
        (folder / "chat_template.jinja").write_text(template)
        theirs = AutoTokenizer.from_pretrained(folder)
        ours = DocumentTokenizer(folder, replace(OPTIONS, datasets=[DatasetConfig("x", messages_field="m")]))
        ids, learnt = ours.encode_conversation(TALK, "here")
        assert ids == theirs.apply_chat_template(TALK, return_dict=True)["input_ids"], name

        # By the tokens' offsets in the text: what the assistant said is learnt, and nothing that the user said.
        text = theirs.apply_chat_template(TALK, tokenize=False)
        at, who = 0, [""] * len(text)
        for message in TALK:
            said = message["content"].strip() if "trim" in template else message["content"]
            at = text.index(said, at)
            who[at : at + len(said)] = [message["role"]] * len(said)
            at += len(said)
        encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        for (begin, end), flag in zip(encoded["offset_mapping"], learnt, strict=True):
            if len(by := {*who[begin:end]}) == 1 and text[begin:end].strip():
                assert (by == {"assistant"}) == flag or by == {""}, (name, text[begin:end])
        words = ours.decode([token for token, flag in zip(ids, learnt, strict=True) if flag])
        assert "return" in words
        assert "hello" not in words.lower()


@pytest.mark.parametrize("kind", ["byte level, as Llama 3", "byte level, as Qwen"])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_spaces_at_the_ends_of_a_reply(kind: str, template: str, tokenizer_of: Callable[[str], Path]) -> None:
    """Some tokenizers leave these spaces out of the offsets of their tokens."""
    folder = tokenizer_of(kind)
    (folder / "chat_template.jinja").write_text(template)
    ours = DocumentTokenizer(folder, replace(OPTIONS, datasets=[DatasetConfig("x", messages_field="m")]))
    talk = [{"role": "user", "content": "a   "}, {"role": "assistant", "content": "b    "}] * 2
    ids, learnt = ours.encode_conversation(talk, "here")
    end = "\n" if template == CHATML else ""
    assert ours.decode([token for token, flag in zip(ids, learnt, strict=True) if flag]) == f"b    <|im_end|>{end}" * 2
