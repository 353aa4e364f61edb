"""Each format is read from real files, and each error has its own message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.records import read_records
from lightning_pipelite.errors import ConfigurationError


def read_documents(path: Path, text_field: str | None = None) -> list[Any]:
    return [record.document for record in read_records(path, DatasetConfig(str(path), text_field=text_field))]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbffirst\r\nse\xc3\xa9cond\rthird\n")
    assert (read_documents(path)) == ["first\nseécond\nthird\n"]


@pytest.mark.parametrize(
    "records", [[{"text": "é\u2028x"}, {"text": "", "other": 3}, {"text": "b"}], ["é\u2028x", "", "b"]]
)
def test_json_and_jsonl(tmp_path: Path, records: list[object]) -> None:
    whole = write(tmp_path / "a.json", json.dumps(records, indent=1, ensure_ascii=False))
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\r\n\n" for r in records))
    assert (read_documents(whole)) == ["é\u2028x", "", "b"]
    assert (read_documents(lines)) == ["é\u2028x", "", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_with_another_field(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"document {number}" for number in range(3000)]
    pq.write_table(pa.table({"id": range(3000), "body": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert (read_documents(tmp_path / "a.parquet", "body")) == texts


BAD = {
    "empty text": ("a.txt", "", r"a\.txt contains no documents"),
    "empty jsonl": ("a.jsonl", "\n\n", r"a\.jsonl contains no documents"),
    "empty json": ("a.json", "", r"a\.json contains no documents"),
    "empty json list": ("a.json", "[]", r"a\.json contains no documents"),
    "utf8 text": ("a.txt", b"one\ntwo\nthr\xe9e\n", r"a\.txt, line 3: not valid UTF-8"),
    "utf8 jsonl": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not valid UTF-8"),
    "utf8 json": ("a.json", b'[\n"a",\n"\xff"]', r"a\.json, line 3: not valid UTF-8"),
    "bad json": ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', r"a\.json, line 3: not valid JSON \(Expecting ':'"),
    "bad line": ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3: not valid JSON"),
    "no list": ("a.json", '{"text": "a"}', r"a\.json, line 1: expected a list of objects or strings, but found dict"),
    "too deep": ("a.jsonl", "[" * 100_000 + "\n", r"a\.jsonl, line 1: JSON nested too deeply"),
    "no field": (
        "a.json",
        '["x", {"body": "a", "b": 1}]',
        r"record 2: no field 'text' \(found: b, body\); set text_f",
    ),
    "number": (
        "a.jsonl",
        '{"text": "a"}\n{"text": 7}',
        r"a\.jsonl, line 2: the field 'text' must be a string, not int",
    ),
    "null": ("a.json", '[{"text": null}]', r"a\.json, record 1: the field 'text' must be a string, not NoneType"),
    "no record": ("a.jsonl", "3", r"a\.jsonl, line 1: the record must be an object or a string, not int"),
    "surrogate": (
        "a.jsonl",
        '{"text": "\\ud800"}',
        r"a\.jsonl, line 1: the field 'text' contains half of a surrogate pair",
    ),
    "no parquet": ("a.parquet", "text", r"a\.parquet is not a readable parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    with pytest.raises(ConfigurationError, match=message):
        (read_documents(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, r"a\.parquet: no column 'text' \(found: body\); set text_field"),
        ({"text": ["a", None]}, r"a\.parquet, row 2: the field 'text' must be a string, not NoneType"),
        ({"text": [1]}, r"a\.parquet, row 1: the field 'text' must be a string, not int"),
        ({"text": pa.array([], pa.string())}, r"a\.parquet contains no documents"),
        ({"text": pa.array([b"a", b"\xff"]).view(pa.string())}, r"a\.parquet, row 2: not valid UTF-8"),
    ],
)
def test_bad_parquet(tmp_path: Path, table: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match=message):
        (read_documents(tmp_path / "a.parquet"))


def test_vanished_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.txt cannot be read \(No such file"):
        (read_documents(tmp_path / "gone.txt"))


@pytest.mark.parametrize("streamed", [True, False])
def test_arrow(tmp_path: Path, streamed: bool) -> None:
    table = pa.table({"id": range(5), "body": list("abcde")})
    new = pa.ipc.new_stream if streamed else pa.ipc.new_file
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert read_documents(tmp_path / "a.arrow", "body") == list("abcde")
    with pytest.raises(ConfigurationError, match=r"a\.arrow: no column 'text' \(found: id, body\)"):
        read_documents(tmp_path / "a.arrow")
    write(tmp_path / "b.arrow", "nonsense")
    with pytest.raises(ConfigurationError, match=r"b\.arrow is not a readable Arrow file"):
        read_documents(tmp_path / "b.arrow")


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pa.Codec("zstd").compress(content, asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps({"text": f"text {number} " * 99}) + "\n" for number in range(500)).encode()
    data = compressed(lines, suffix)
    path = write(tmp_path / f"a.jsonl{suffix}", data)
    assert read_documents(path) == [f"text {number} " * 99 for number in range(500)]
    assert read_documents(write(tmp_path / f"a.txt{suffix}", compressed(b"one\r\ntwo", suffix))) == ["one\ntwo"]
    for damaged in (data[: len(data) // 2], b"no such thing"):
        with pytest.raises(ConfigurationError, match=r"cannot be read \(.*\): check the file"):
            read_documents(write(tmp_path / f"b.jsonl{suffix}", damaged))


def test_bad_records_can_be_skipped_and_told(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a"}', b'{"text": 7}', b"{", b'{"text": "\xff"}', b'{"body": "x"}', b'{"text": "b"}'
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    errors: list[str] = []
    records = list(read_records(path, DatasetConfig("a"), lambda error: errors.append(str(error))))
    assert [(record.document, record.place) for record in records] == [
        ("a", f"{path}, line 1"),
        ("b", f"{path}, line 6"),
    ]
    assert [error.split(": ")[0] for error in errors] == [f"{path}, line {number}" for number in (2, 3, 4, 5)]
    errors.clear()
    assert not list(
        read_records(write(tmp_path / "b.txt", b"\xff"), DatasetConfig("b"), lambda e: errors.append(str(e)))
    )
    assert errors == [f"{tmp_path / 'b.txt'}, line 1: not valid UTF-8; convert the file to UTF-8."]


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_conversations(tmp_path: Path) -> None:
    dataset = DatasetConfig("x", messages_field="talk")
    path = write(tmp_path / "a.jsonl", json.dumps({"talk": TALK}) + "\n" + json.dumps({"talk": TALK * 2}))
    assert [record.document for record in read_records(path, dataset)] == [TALK, TALK * 2]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    rows = [TALK, [TALK[0], *calls]]
    pq.write_table(pa.table({"talk": rows}), tmp_path / "a.parquet")
    assert [record.document for record in read_records(tmp_path / "a.parquet", dataset)] == rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "the field 'messages' must be a non-empty list of messages"),
        ([], "the field 'messages' must be a non-empty list of messages"),
        (["hello"], "message 1 of the field 'messages' has no role"),
        ([TALK[1], {"content": "x"}], "message 2 of the field 'messages' has no role"),
        (
            [TALK[1], {"role": "user"}],
            "the content of message 2 of the field 'messages' must be a string, not NoneType",
        ),
        (
            [TALK[1], {"role": "user", "content": [1]}],
            "the content of message 2 of the field 'messages' has a part of type int",
        ),
        ([TALK[0]], "the field 'messages' has no assistant message, so there is nothing to learn"),
    ],
)
def test_bad_conversation(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": value}))
    with pytest.raises(ConfigurationError, match=rf"a\.jsonl, line 1: {message}"):
        list(read_records(path, DatasetConfig("x", messages_field="messages")))


def test_text_holds_no_messages(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"a\.txt is a text file, which has no messages: remove messages_field"
    ):
        list(read_records(write(tmp_path / "a.txt", "x"), DatasetConfig("x", messages_field="messages")))


def test_what_stands_within_quotes_separates_no_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '"text",n,"a; ""b""; c;; d"\nx,1,y\n')
    assert read_documents(path) == ["x"]
