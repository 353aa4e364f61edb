"""Which tokens are learnt if a template renders a turn differently when others follow, as well-known ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tokens import OPTIONS
from transformers import AutoTokenizer

from chat_tokenizers import write_tokenizer
from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.conversation import check_messages
from lightning_pipelite.data.tokens import DocumentTokenizer

# Renders reasoning only after the last question, and an empty one in the last message.
QWEN = """{%- set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}
{%- elif m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}
{{- '<|im_start|>assistant\n' }}{% set reasoning = m.reasoning_content or '' %}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}
{{- m.content }}{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}
{{- '<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Renders tools with the last question; calls have ids.
MISTRAL = """{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}
{%- for m in messages %}{% if m.role == 'user' %}
{%- if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) }}{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}{% endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'tool' %}
{%- if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}
{{- '[TOOL_RESULTS] ' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
# Renders reasoning only in the last message and in calls that no answer follows; the last message ends differently.
CHANNELS = """{% for m in messages %}{% if m.role == 'user' %}{{ '<start>user ' + m.content + '<end>' }}
{%- elif m.role == 'tool' %}{{ '<start>tool ' + m.content + '<end>' }}{% elif 'tool_calls' in m %}
{%- set ns = namespace(answer=false) %}{% for n in messages[loop.index:] %}
{%- if n.role == 'assistant' and 'tool_calls' not in n %}{% set ns.answer = true %}{% endif %}{% endfor %}
{%- set thought = m.content or m.thinking %}
{%- if thought and not ns.answer %}{{ '<start>assistant<analysis>' + thought + '<end>' }}{% endif %}
{{- '<start>assistant to=' + m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson) + '<call>' }}
{%- elif loop.last %}{% if m.thinking %}{{ '<start>assistant<analysis>' + m.thinking + '<end>' }}{% endif %}
{{- '<start>assistant<final>' + m.content + '<return>' }}
{%- else %}{{ '<start>assistant<final>' + m.content + '<end>' }}{% endif %}{% endfor %}
{%- if tools %}{{ '' }}{% endif %}{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}"""
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {}}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(city: str, content: str = "", **more: Any) -> list[dict[str, Any]]:
    """Return a call and its result."""
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "sky", "arguments": {"c": city}}}]
    result = {"role": "tool", "content": "it said", "tool_call_id": "abcdefghi"}
    return [reply(content, tool_calls=calls, **more), result]


@pytest.fixture
def learn(tmp_path: Path) -> Callable[..., list[str]]:
    """A function that returns the learnt pieces of a conversation, and checks its ids against `apply_chat_template`."""

    def run(template: str, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[str]:
        folder = write_tokenizer(tmp_path / "tokenizer", "byte level, as Llama 3", template)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ours = DocumentTokenizer(folder, replace(OPTIONS, datasets=[DatasetConfig("x", messages_field="m")]))
        checked = check_messages(messages, "here", "m")
        ids, flags = ours.encode_conversation(checked, "here", {"tools": tools} if tools else {})
        given = [{key: value for key, value in each.items() if value != []} for each in messages]
        assert ids == tokenizer.apply_chat_template(given, tools=tools)["input_ids"]
        pieces: list[list[int]] = []
        for number, (token, flag) in enumerate(zip(ids, flags, strict=True)):
            if flag and (number == 0 or not flags[number - 1]):
                pieces.append([])
            if flag:
                pieces[-1].append(token)
        return [tokenizer.decode(piece) for piece in pieces]

    return run


def test_reasoning_of_the_last_turn_alone(learn: Callable[..., list[str]]) -> None:
    talk = [user("a"), reply("b", reasoning_content="r1"), user("c"), reply("d", reasoning_content="r2")]
    assert learn(QWEN, talk) == ["b<|im_end|>", "<think>\nr2\n</think>\n\nd<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (QWEN, ["hi<|im_end|>\n", "<think>\n\n</think>\n\nb<|im_end|>\n"]),
        (MISTRAL, [" hi</s>", " b</s>"]),
        (CHANNELS, ["<final>hi", "<final>b<return>"]),
        ("{{ messages[0].role and '' }}" + QWEN, ["<think>\n\n</think>\n\nb<|im_end|>\n"]),  # raises without messages
    ],
)
def test_the_mark_before_a_leading_reply_is_not_learnt(
    template: str, learnt: list[str], learn: Callable[..., list[str]]
) -> None:
    assert learn(template, [reply("hi"), user("a"), reply("b")]) == learnt


def test_a_call_behind_words_is_learnt(learn: Callable[..., list[str]]) -> None:
    talk = [user("a"), *call("X", "Let me look."), reply("b"), user("c"), *call("Y", reasoning_content="r"), reply("d")]
    assert learn(QWEN, talk, [TOOL]) == [
        'Let me look.\n<tool_call>sky{"c": "X"}</tool_call><|im_end|>',
        "b<|im_end|>",
        '<think>\nr\n</think>\n\n<tool_call>sky{"c": "Y"}</tool_call><|im_end|>\n',
        "<think>\n\n</think>\n\nd<|im_end|>\n",
    ]


def test_empty_replies_end(learn: Callable[..., list[str]]) -> None:
    assert learn(QWEN, [user("a"), reply(""), user("c"), reply("d")])[0] == "<|im_end|>"


def test_tools_beside_the_last_question(learn: Callable[..., list[str]]) -> None:
    turn = [*call("X"), reply("b")]
    assert learn(MISTRAL, [user("a"), *turn, user("c"), *turn], [TOOL]) == [
        '[TOOL_CALLS] [{"name": "sky", "arguments": {"c": "X"}, "id": "abcdefghi"}]</s>',
        " b</s>",
    ] * 2  # fmt: skip


@pytest.mark.parametrize("thought", [{"thinking": "hm"}, {"content": "hm"}, {}])
def test_what_is_left_out_of_calls_before_an_answer(thought: dict[str, str], learn: Callable[..., list[str]]) -> None:
    talk = [
        user("a"),
        *call("X", **thought),
        reply("b", thinking="so"),
        user("c"),
        *call("Y"),
        reply("d", thinking="z"),
    ]
    assert learn(CHANNELS, talk) == [
        ' to=sky{"c": "X"}<call>',
        "<final>b",  # its end mark is not a special token of this tokenizer
        ' to=sky{"c": "Y"}<call>',
        "<analysis>z<end><start>assistant<final>d<return>",
    ]


@pytest.mark.parametrize("template", [QWEN, MISTRAL, CHANNELS])
def test_no_calls_are_none(template: str, learn: Callable[..., list[str]]) -> None:
    """Columnar files give every message a list of calls, and templates test whether there is one."""
    with_lists = [user("a"), reply("b", tool_calls=[]), user("c"), reply("d", tool_calls=[])]
    assert learn(template, with_lists) == learn(template, [user("a"), reply("b"), user("c"), reply("d")])
