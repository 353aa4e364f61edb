"""Any error in a record names its file and line; bad records can be skipped, and the others are still read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_conversations import ASK, REPLY, call
from transformers import PreTrainedTokenizerFast

from chat_templates import CHATML
from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.data import tokens as tokens_module
from lightning_pipelite.data.records import read_records
from lightning_pipelite.errors import ConfigurationError

MakeData = Callable[..., PackedDataModule]
DIGITS = "7" * 5000
DEEP = '{"a":' * 200 + "1" + "}" * 200
DEEPER = "[" * 100_000 + "]" * 100_000
GOOD = ['{"text": "one and the same"}', '{"text": "another"}', '{"text": "third"}']

LINES = {
    "digits in another key": f'{{"text": "b", "answer": {DIGITS}}}',
    "digits": f'{{"text": {DIGITS}}}',
    "nested": f'{{"text": "b", "more": {DEEPER}}}',
    "half a pair": '{"text": "\\ud83d"}',
    "not a number": '{"text": NaN}',
    "no JSON": '{"text": "b"',
    "a number": "3",
    "null": "null",
    "a list": '["b"]',
    "other key": '{"body": "b"}',
    "bytes": b'{"text": "\xff"}',
}


def skipped(data: PackedDataModule) -> tuple[int, str, int]:
    """Return how many records were skipped, the message about the first, and the number of documents."""
    data.prepare_data()
    assert data.statistics is not None
    (dataset,) = data.statistics.datasets
    return dataset.skipped, dataset.first_skipped, dataset.documents


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("bad", LINES)
def test_a_line(bad: str, name: str, tmp_path: Path, make_data: MakeData) -> None:
    """In a .jsonl file, and in a .json file with one record per line."""
    line = LINES[bad]
    content = [
        GOOD[0].encode(),
        line if isinstance(line, bytes) else line.encode(),
        *(good.encode() for good in GOOD[1:]),
    ]
    (tmp_path / name).write_bytes(b"\n".join(content))
    data = [DatasetConfig(str(tmp_path / name))]
    with pytest.raises(ConfigurationError, match=rf"{name}, line 2: "):
        make_data(data).prepare_data()
    count, first, documents = skipped(make_data(data, skip_bad_records=True))
    assert (count, documents) == (1, 3)
    assert f"{name}, line 2: " in first


@pytest.mark.parametrize("bad", ["digits in another key", "nested", "half a pair", "not a number", "null", "other key"])
def test_an_element_of_a_list(bad: str, tmp_path: Path, make_data: MakeData) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"[{GOOD[0]},\n\n{LINES[bad]} ,\n{GOOD[1]}, {GOOD[2]} ]\n")
    data = [DatasetConfig(str(path))]
    with pytest.raises(ConfigurationError, match=r"a\.json, (line 3|record 2): "):
        make_data(data).prepare_data()
    count, first, documents = skipped(make_data(data, skip_bad_records=True))
    assert (count, documents) == (1, 3)
    assert first.startswith((f"{path}, line 3: ", f"{path}, record 2: "))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_list_gives_what_is_before(number: int, tmp_path: Path, make_data: MakeData) -> None:
    path = tmp_path / "a.json"
    records = list(GOOD)
    records[number] = records[number].replace(":", "", 1)
    path.write_text("[" + ",\n".join(records) + "]")
    (tmp_path / "b.jsonl").write_text('{"text": "whole"}')
    data = make_data([DatasetConfig(str(tmp_path / "*.json*"))], skip_bad_records=True)
    assert skipped(data)[0::2] == (0, number + 1)
    said = f"a.json, line {number + 1}: not valid JSON (Expecting ':' delimiter, column"
    assert any(f"1 file not read to the end: {path.parent}/{said}" in line for line in data.summary())


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_a_file_that_breaks_off(suffix: str, tmp_path: Path, make_data: MakeData) -> None:
    """This is an error; with skip_bad_records, the summary reports the file as not read to the end instead."""
    lines = [json.dumps({"text": f"{number} {'x' * 99}" if number % 50 else None}) for number in range(999)]
    content = "\n".join(lines).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix:
        path.write_bytes(gzip.compress(content)[:-500])
    else:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": [f"text {number}" for number in range(9000)]}), path, compression="none")
        damaged = bytearray(path.read_bytes())
        damaged[20_000:40_000] = b"\xff" * 20_000
        path.write_bytes(bytes(damaged))
    (tmp_path / "b.jsonl").write_text('{"text": "whole"}')
    config = [DatasetConfig(str(tmp_path / "*"))]
    with pytest.raises(ConfigurationError, match=r"a\.(jsonl|parquet)"):
        make_data(config).prepare_data()
    data = make_data(config, skip_bad_records=True)
    assert skipped(data)[2] > (1 if suffix else 0)  # records before the damage count, whole groups of rows in Parquet
    assert any(f"1 file not read to the end: {path}" in line for line in data.summary())


BROKEN = {
    "raises": "{{ raise_exception('no') }}",
    "undefined": "{{ m.a.b }}",
    "divides": "{{ 1 / 0 }}",
    "is endless": "{{ range(10 ** 9) | list }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no attribute": "{{ m.content.nothing() }}",
    "adds": "{{ 'a' + 1 }}",
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_a_template_raises(what: str, tmp_path: Path, make_tokenizer: Any, make_data: MakeData) -> None:
    folder = make_tokenizer({"bos_token": "<s>", "eos_token": "<|im_end|>"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    wrong = "{% if m.content == 'bad' %}" + BROKEN[what].replace("{% macro", "{%- macro") + "{% endif %}"
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + wrong)
    tokenizer.save_pretrained(folder)
    talks = [[ASK, {**REPLY, "content": said}] for said in ("good", "bad", "well")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"m": talk}) for talk in talks))
    data = [DatasetConfig(str(tmp_path / "a.jsonl"), messages_field="m")]
    options = {"tokenizer_dir": str(folder), "eval_fraction": 0.0}
    with pytest.raises(ConfigurationError, match=r"a\.jsonl, line 2: the chat template rejects the conversation \("):
        make_data(data, **options).prepare_data()
    count, first, documents = skipped(make_data(data, skip_bad_records=True, **options))
    assert (count, documents) == (1, 2)
    assert "line 2" in first


@pytest.mark.parametrize(
    "arguments", [DIGITS, DEEP, '"\\ud800"', "NaN", "1e999"], ids=["digits", "deep", "half a pair", "NaN", "infinite"]
)
def test_what_is_within_a_conversation(
    arguments: str, tmp_path: Path, make_tokenizer: Any, make_data: MakeData
) -> None:
    folder = make_tokenizer({"bos_token": "<s>", "eos_token": "<|im_end|>"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    bad = json.dumps({"m": [ASK, call("f", "ARGUMENTS")]}).replace('"ARGUMENTS"', arguments)
    good = json.dumps({"m": [ASK, REPLY]})
    (tmp_path / "a.jsonl").write_text("\n".join([good, bad]))
    data = [DatasetConfig(str(tmp_path / "a.jsonl"), messages_field="m")]
    options = {"tokenizer_dir": str(folder), "eval_fraction": 0.0}
    with pytest.raises(ConfigurationError, match=r"a\.jsonl, line 2: "):
        make_data(data, **options).prepare_data()
    assert skipped(make_data(data, skip_bad_records=True, **options))[0::2] == (1, 1)


class PanicError(BaseException):
    """Like a Rust panic in tokenizers, this is not an Exception."""


@pytest.mark.parametrize("error", [PanicError, OverflowError, TypeError, RecursionError])
def test_whatever_a_tokenizer_raises(
    error: type[BaseException], tmp_path: Path, make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokens_module.DocumentTokenizer.encode

    def failing(self: Any, texts: list[str]) -> list[list[int]]:
        if "another" in texts:
            raise error("no")
        return encode(self, texts)

    monkeypatch.setattr(tokens_module.DocumentTokenizer, "encode", failing)
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD))
    data = [DatasetConfig(str(tmp_path / "a.jsonl"))]
    with pytest.raises(ConfigurationError, match=r"a\.jsonl, line 2: the tokenizer rejects the text \(no\)"):
        make_data(data).prepare_data()
    assert skipped(make_data(data, skip_bad_records=True))[0::2] == (1, 2)


def test_rows_of_columns(tmp_path: Path, make_data: MakeData) -> None:
    """A timestamp that Python cannot represent spoils only its own row."""
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "at": pa.timestamp("s")}))
    talk = [{"role": "user", "content": "a", "at": 10**15}, {"role": "assistant", "content": "b", "at": None}]
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    assert skipped(make_data([DatasetConfig(str(tmp_path / "a.parquet"))], skip_bad_records=True))[0] == 1
    table = pa.table({"m": pa.array([talk, [{**talk[0], "at": None}, *talk[1:]]], kind)})
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    errors: list[str] = []
    dataset = DatasetConfig("b", messages_field="m")
    read = list(read_records(tmp_path / "b.arrow", dataset, lambda error: errors.append(str(error))))
    assert [len(record.document) for record in read] == [2]
    assert errors[0].startswith(f"{tmp_path / 'b.arrow'}, row 1: ")


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', 2),
        ('\n{"text": "a"}\r\n\r\n{"text": "b"}', 2),
        ('"a"\n"b"\n"c"', 3),
        ('["a",\n"b"]', 2),
        ('[\n"a"\n,\n"b"\n]\n', 2),
        ('["a", "b"]\n\n', 2),
        ("[]", None),
        ('{"text": "a"}', None),
        ('{\n"text": "a"\n}', None),
        ('{"data":\n{"text": "a"}\n}', None),
        ('{\n"text": "a"\n}\n{\n"text": "b"\n}', None),
    ],
)
def test_json_is_a_list_or_lines(content: str, documents: int | None, tmp_path: Path, make_data: MakeData) -> None:
    (tmp_path / "a.json").write_text(content)
    data = make_data([DatasetConfig(str(tmp_path / "a.json"))])
    if documents is None:
        with pytest.raises(ConfigurationError, match=r"a\.json"):
            data.prepare_data()
    else:
        assert skipped(data)[2] == documents
