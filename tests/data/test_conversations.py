"""What a record holds besides its text is used, refused or reported, never silently ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_tokens import OPTIONS
from transformers import PreTrainedTokenizerFast

from chat_templates import CHATML, MARKED, THINKING
from lightning_pipelite.data import PackedDataModule
from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.records import read_records
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError

# Like the templates of models that call tools.
TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if enable_thinking is defined %}think={{ enable_thinking }}\n"
    "{% endif %}{% for d in documents or [] %}{{ d.title }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<{{ m.reasoning_content }}>"
    "{% endif %}{{ m.content }}{% for t in m.tool_calls or [] %}{{ t.function.name }} "
    "{{ t.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "ask"}
REPLY = {"role": "assistant", "content": "reply"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.fixture
def make(make_tokenizer: Callable[..., Path]) -> Callable[[str], tuple[DocumentTokenizer, Any]]:
    def build(template: Any) -> tuple[DocumentTokenizer, Any]:
        folder = make_tokenizer({"bos_token": "<s>", "eos_token": "<|im_end|>"})
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        options = replace(OPTIONS, datasets=[DatasetConfig("x", messages_field="messages")])
        return DocumentTokenizer(folder, options), tokenizer

    return build


def record_of(record: dict[str, Any], folder: Path) -> Any:
    """Return a record as it is read from a file."""
    (folder / "a.jsonl").write_text(json.dumps(record))
    (read,) = read_records(folder / "a.jsonl", DatasetConfig("x", messages_field="messages"))
    return read


def encode(make: Any, template: str, record: dict[str, Any], folder: Path) -> tuple[list[int], str, set[str], Any]:
    """Return the ids, the text that is learnt, the ignored keys, and the tokenizer."""
    ours, tokenizer = make(template)
    read, passed_over = record_of(record, folder), set[str]()
    ids, learnt = ours.encode_conversation(read.document, read.place, read.arguments, read.others, passed_over)
    said = tokenizer.decode([token for token, flag in zip(ids, learnt, strict=True) if flag])
    return ids, said, passed_over, tokenizer


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [TOOL], "documents": [{"title": "Paris", "text": "x"}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
@pytest.mark.parametrize("reply", [REPLY, call("add", {"a": None}), {**REPLY, "reasoning_content": "hm"}])
def test_what_the_template_is_given(make: Any, tmp_path: Path, extra: dict[str, Any], reply: dict[str, Any]) -> None:
    record = {"messages": [ASK, reply, ASK, REPLY], **extra, "id": 7, "source": None}
    ids, said, passed_over, tokenizer = encode(make, TOOLS, record, tmp_path)
    tools = extra.get("tools")
    arguments = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        "documents": extra.get("documents"),
        **extra.get("chat_template_kwargs", {}),
    }
    assert ids == tokenizer.apply_chat_template(record["messages"], **arguments)["input_ids"]
    assert "ask" not in said
    assert "weather" not in said
    assert said.endswith("reply<|im_end|>\n")
    assert passed_over == {"id"}


def test_a_template_of_its_own_for_tools(make: Any, tmp_path: Path) -> None:
    record = {"messages": [ASK, REPLY], "tools": [TOOL]}
    templates: Any = {"default": CHATML, "tool_use": TOOLS}
    ids, _, _, tokenizer = encode(make, templates, record, tmp_path)
    assert ids == tokenizer.apply_chat_template(record["messages"], tools=[TOOL])["input_ids"]
    assert "weather" in tokenizer.decode(ids)


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING])
def test_replies_without_weight_are_not_learnt(make: Any, tmp_path: Path, template: str) -> None:
    bad, good = {**REPLY, "content": "bad", "weight": 0}, {**REPLY, "content": "good", "weight": 1}
    for order in ([ASK, bad, ASK, good], [ASK, good, ASK, bad], [ASK, REPLY, ASK, bad, ASK, good]):
        ids, said, _, tokenizer = encode(make, template, {"messages": order}, tmp_path)
        assert ids == tokenizer.apply_chat_template(order)["input_ids"]
        assert "good" in said
        assert "bad" not in said
        assert ("reply" in said) == (REPLY in order)
    with pytest.raises(
        ConfigurationError, match=r"line 1: no reply has a weight above 0, so there is nothing to learn"
    ):
        encode(make, template, {"messages": [ASK, bad]}, tmp_path)


@pytest.mark.parametrize("streamed", [None, True, False])
def test_columns_give_no_key_that_a_record_has_not(tmp_path: Path, streamed: bool | None) -> None:
    """Arrow gives every object in a column the keys of all others; keys without a value are left out again."""
    rows = [
        {"messages": [ASK, call("weather", {"city": "Paris"})], "tools": [TOOL]},
        {"messages": [ASK, call("add", {"a": 1, "b": [1, None]})], "tools": None},
        {"messages": [ASK, call("now", {}), REPLY], "tools": [{"type": "function", "function": {"name": "now"}}]},
    ]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / ("a.parquet" if streamed is None else "a.arrow")
    if streamed is None:
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if streamed else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    read = list(read_records(path, DatasetConfig("x", messages_field="messages")))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = list(read_records(tmp_path / "a.jsonl", DatasetConfig("x", messages_field="messages")))
    assert [(each.document, each.arguments) for each in read] == [(each.document, each.arguments) for each in lines]


def test_a_map_is_an_object(tmp_path: Path) -> None:
    kind = pa.struct({"name": pa.string(), "arguments": pa.map_(pa.string(), pa.string())})
    message = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(kind)})
    calls = [{"name": "f", "arguments": [("a", "1"), ("b", None)]}]
    rows = [[{"role": "user", "content": "ask"}, {"role": "assistant", "content": None, "tool_calls": calls}]]
    pq.write_table(pa.table({"m": pa.array(rows, pa.list_(message))}), tmp_path / "a.parquet")
    (read,) = read_records(tmp_path / "a.parquet", DatasetConfig("x", messages_field="m"))
    assert read.document[1]["tool_calls"] == [{"name": "f", "arguments": {"a": "1", "b": None}}]  # type: ignore[call-overload]


PARTS = [{"type": "text", "text": "ask"}]
READS_PARTS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}"
    "{% endif %}",
)


def test_contents_in_parts(make: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": PARTS}, REPLY]
    ids, _, _, tokenizer = encode(make, CHATML, {"messages": messages}, tmp_path)
    assert ids == tokenizer.apply_chat_template([ASK, REPLY])["input_ids"]
    twice = [{"role": "user", "content": PARTS * 2}, REPLY]
    ids, _, _, tokenizer = encode(make, READS_PARTS, {"messages": twice}, tmp_path)
    assert ids == tokenizer.apply_chat_template(twice)["input_ids"]
    with pytest.raises(ConfigurationError, match="line 1: the content of message 1 has 2 parts, but the chat"):
        encode(make, CHATML, {"messages": twice}, tmp_path)


NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
ONLY_PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (CHATML, {"tools": [TOOL]}, "the chat template does not render the tools of this conversation"),
        (CHATML, {"documents": [{"title": "a"}]}, "the chat template does not render the documents"),
        (CHATML, {"chat_template_kwargs": {"x": 1}}, "the chat template does not read 'x' of chat_template_kwargs"),
        (
            TOOLS,
            {"chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs contains 'tools', which must be a field of the record",
        ),
        (TOOLS, {"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, not list"),
        (TOOLS, {"enable_thinking": True}, "the chat template reads 'enable_thinking', but the record has it outside"),
        (TOOLS, {"tools": "weather"}, "tools is text, but not valid JSON"),
        (TOOLS, {"tools": ["weather"]}, "tools must be a list of objects"),
        (TOOLS, {"tools": [{"maximum": float("nan")}]}, "tools contains nan, which is not valid JSON"),
        (TOOLS, {"functions": [{"name": "f"}]}, "the record has functions, which are deprecated in favour of tools"),
        (CHATML, {"weight": 0.5}, "the record has a 'weight' of 0.5, but all records count equally"),
        (CHATML, {"loss_mask": [0, 1]}, r"the record has a 'loss_mask' of \[0, 1\]"),
        (CHATML, {"messages": [ASK, call("f", {})]}, "the chat template does not render all tool_calls of message 2"),
        (
            TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            {"messages": [ASK, {**REPLY, "tool_calls": [*call("f", {})["tool_calls"], *call("f", {})["tool_calls"]]}]},
            "does not render all tool_calls of message 2",
        ),
        (
            TOOLS.replace("m.tool_calls or []", "(m.tool_calls or []) if m.content is undefined"),
            {"messages": [ASK, call("f", {}), REPLY]},
            "does not render all tool_calls of message 2",
        ),
        (CHATML, {"messages": [ASK, {**REPLY, "thinking": "x"}]}, "does not render the thinking of message 2"),
        (
            "{% if thinking %}Think. {% endif %}" + CHATML,
            {"messages": [ASK, {**REPLY, "thinking": "x"}]},
            "does not render the thinking of message 2",
        ),
        (CHATML, {"messages": [{**ASK, "images": ["x"]}, REPLY]}, "does not render the images of message 1"),
        (
            TOOLS,
            {"messages": [{**ASK, "role": "system", "tools": [TOOL]}, ASK, REPLY]},
            "not render the tools of message 1",
        ),
        (
            NO_SYSTEM,
            {"messages": [{**ASK, "role": "system", "content": "be"}, ASK, REPLY]},
            "does not render message 1",
        ),
        (ONLY_PARTS, {"messages": [ASK, REPLY]}, "(does not render message 1|cannot be located)"),
        (
            CHATML,
            {"messages": [ASK, {**REPLY, "role": "gpt"}, REPLY]},
            "the role of message 2 is 'gpt'; change it to assist",
        ),
        (
            CHATML,
            {"messages": [{**ASK, "role": "boss"}, REPLY]},
            "the role of message 1 is 'boss'; change it to one of",
        ),
        (CHATML, {"messages": [ASK, {**REPLY, "weight": 0.5}]}, "has a weight of 0.5; use 0 or 1 for the assistant"),
        (CHATML, {"messages": [{**ASK, "weight": 1}, REPLY]}, "message 1 .* has a weight of 1; use 0"),
        (CHATML, {"messages": [ASK, {**REPLY, "train": False}]}, "message 2 .* has 'train'; use a weight of 0 or 1"),
        (CHATML, {"messages": [{**ASK, "content": [{"type": "image_url"}]}, REPLY]}, "has a part of type image_url"),
        (TOOLS, {"messages": [ASK, {**REPLY, "tool_calls": "[]"}]}, "the tool_calls of message 2 .* must be a list"),
        (
            TOOLS,
            {"messages": [ASK, call("f", {"a": float("inf")})]},
            "message 2 .* contains inf, which is not valid JSON",
        ),
        (TOOLS, {"messages": [ASK, call("f", {"a": "\ud800"})]}, "message 2 .* contains half of a surrogate pair"),
    ],
)
def test_what_would_be_passed_over(
    make: Any, tmp_path: Path, template: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"a\.jsonl, line 1: .*{message}"):
        encode(make, template, {"messages": [ASK, REPLY], **record}, tmp_path)


def test_what_says_nothing_is_named(make: Any, tmp_path: Path) -> None:
    messages = [{**ASK, "name": "me"}, {**REPLY, "refusal": None, "annotations": [], "id": "x"}]
    kwargs = {"enable_thinking": False, "x": None}
    record = {"messages": messages, "tools": [], "parallel_tool_calls": False, "chat_template_kwargs": kwargs}
    _, _, passed_over, _ = encode(make, CHATML, {**record, "weight": 1, "note": None}, tmp_path)
    assert passed_over == {
        "parallel_tool_calls", "name of messages", "id of messages", "chat_template_kwargs.enable_thinking"
    }  # fmt: skip
    dumps = "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}"  # renders every key
    assert "name of messages" not in encode(make, dumps, {"messages": [{**ASK, "name": "me"}, REPLY]}, tmp_path)[2]
    text = {**call("f", json.dumps({"a": 1})), "content": "x"}
    assert encode(make, TOOLS, {"messages": [ASK, text]}, tmp_path)[2] == {
        "the JSON structure of tool-call arguments (strings that the template quotes again)"
    }


def test_calls_in_earlier_turns_of_a_template_that_adds_to_the_last(make: Any, tmp_path: Path) -> None:
    template = TOOLS.replace(
        "{% if m.reasoning", "{% if loop.last and m.role == 'assistant' %}[think]{% endif %}{% if m.reasoning"
    )
    answer = {"role": "tool", "content": "sunny"}
    messages = [ASK, call("weather", {"city": "Paris"}), answer, REPLY, ASK, REPLY]
    ids, said, _, tokenizer = encode(make, template, {"messages": messages}, tmp_path)
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert said == 'weather {"city": "Paris"}<|im_end|>reply<|im_end|>[think]reply<|im_end|>\n'


def test_ignored_keys_are_told(make_data: Callable[..., PackedDataModule], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}", "id": n, "source": None, "meta": {}}) + "\n" for n in range(9))
    )
    pq.write_table(pa.table({"text": ["x"], "url": ["y"]}), tmp_path / "b.parquet")
    data = make_data([DatasetConfig(str(tmp_path / "a.jsonl")), DatasetConfig(str(tmp_path / "b.parquet"))])
    first, second = (line for line in data.summary() if line.startswith("dataset"))
    assert first.endswith(", ignored keys: id, meta")
    assert second.endswith(", ignored keys: url")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "weight": 0.5}')
    with pytest.raises(ConfigurationError, match=r"a\.jsonl, line 1: the record has a 'weight' of 0\.5"):
        make_data([DatasetConfig(str(tmp_path / "a.jsonl"))]).prepare_data()


def test_ignored_keys_can_be_shown(make_data: Callable[..., PackedDataModule], tmp_path: Path) -> None:
    """Whatever characters they contain: a terminal cannot print half of a surrogate pair."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "text", "\ud800": 1, "a\nb": 1, "k" * 999: 1, "größe": 1}))
    data = [DatasetConfig(str(path))]
    (line,) = (line for line in make_data(data).summary() if line.startswith("dataset"))
    assert line.encode().decode().endswith(rf", ignored keys: \ud800, a\nb, größe, {'k' * 60}...")
    path.write_text(json.dumps({"\ud800": 1}))
    with pytest.raises(ConfigurationError, match=r"no field 'text' \(found: \\ud800\)"):
        make_data(data).prepare_data()


@pytest.mark.parametrize(
    "flag",
    [{"weights": 0}, {"train_on": False}, {"trainable": True}, {"is_trained": 0.5}, {"ignore": True}, {"skip": 1}],
)
def test_flags_of_messages_that_are_not_known(make: Callable[..., Any], tmp_path: Path, flag: dict[str, Any]) -> None:
    (key,) = flag
    with pytest.raises(ConfigurationError, match=f"message 2 has a '{key}' of .*, which the chat template does not"):
        encode(make, CHATML, {"messages": [ASK, {**REPLY, **flag}]}, tmp_path)
    read = CHATML + "{% if messages[1]." + key + " %}{% endif %}"
    encode(make, read, {"messages": [ASK, {**REPLY, **flag, "id": 3}]}, tmp_path)


@pytest.mark.parametrize(
    ("flag", "as_others"), [("mask", None), ("masked", 0), ("train_on_turn", True), ("skip", False), ("trainable", 1)]
)
def test_flags_of_records(make: Callable[..., Any], tmp_path: Path, flag: str, as_others: object) -> None:
    encode(make, CHATML, {"messages": [ASK, REPLY], flag: as_others}, tmp_path)
    with pytest.raises(ConfigurationError, match=f"the record has a '{flag}' of"):
        encode(make, CHATML, {"messages": [ASK, REPLY], flag: not as_others}, tmp_path)


def test_files_that_are_not_read_are_told(make_data: Callable[..., PackedDataModule], tmp_path: Path) -> None:
    for name in ("a.txt", "b.pdf", "README.md", ".hidden"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text("text")
    (line,) = (line for line in make_data([DatasetConfig(str(tmp_path / "d"))]).summary() if line.startswith("dataset"))
    assert line.endswith(", files not read: README.md, b.pdf")
    with pytest.raises(ConfigurationError, match=r"a\.txt is text, which has no fields: remove text_field"):
        make_data([DatasetConfig(str(tmp_path / "d" / "a.txt"), text_field="body")]).prepare_data()


@pytest.mark.parametrize("key", ["document_prefix", "document_suffix", "add_prefix_space"])
def test_options_that_conversations_have_no_use_for(key: str) -> None:
    datasets = [DatasetConfig("x", messages_field="m")]
    value = True if key == "add_prefix_space" else "a"
    with pytest.raises(ConfigurationError, match=rf"data\.{key} does not apply to conversations"):
        replace(OPTIONS, datasets=datasets, **{key: value})
    replace(OPTIONS, datasets=[*datasets, DatasetConfig("y")], **{key: value})
    with pytest.raises(ConfigurationError, match="x has both text_field and messages_field"):
        replace(OPTIONS, datasets=[DatasetConfig("x", text_field="a", messages_field="m")])
