"""Each format with real files, and each error with its sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_pipelite.data.sources import find_files, read_documents
from lightning_pipelite.errors import ConfigurationError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbffirst\r\nse\xc3\xa9cond\rthird\n")
    assert list(read_documents(path, "text")) == ["first\nseécond\nthird\n"]


@pytest.mark.parametrize(
    "records", [[{"text": "é\u2028x"}, {"text": "", "other": 3}, {"text": "b"}], ["é\u2028x", "", "b"]]
)
def test_json_and_jsonl(tmp_path: Path, records: list[object]) -> None:
    whole = write(tmp_path / "a.json", json.dumps(records, indent=1, ensure_ascii=False))
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\r\n\n" for r in records))
    assert list(read_documents(whole, "text")) == ["é\u2028x", "", "b"]
    assert list(read_documents(lines, "text")) == ["é\u2028x", "", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_with_another_field(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"document {number}" for number in range(3000)]
    pq.write_table(pa.table({"id": range(3000), "body": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet", "body")) == texts


def test_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b.txt", "a.json", "README.md", "deep/c.txt", "deep/deeper/d.txt", "odd[1].txt"]
    for name in names:
        write(tmp_path / name, "x")

    def found(path: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in find_files(path)]

    assert found(str(tmp_path)) == ["a.json", "b.txt", "odd[1].txt"]
    assert found(str(tmp_path / "b.txt")) == ["b.txt"]
    assert found(str(tmp_path / "odd[1].txt")) == ["odd[1].txt"]
    assert found(str(tmp_path / "**/*.txt")) == ["b.txt", "deep/c.txt", "deep/deeper/d.txt", "odd[1].txt"]
    monkeypatch.chdir(tmp_path)
    assert found("b.txt") == ["b.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/deep/*") == ["deep/c.txt"]


@pytest.mark.parametrize("name", ["none.txt", "none*.txt", "empty"])
def test_nothing_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=rf"dataset_path .*{re.escape(name)} matches no file: name a file"):
        find_files(str(tmp_path / name))


def test_unknown_format(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x")
    for path in ("a.csv", "*"):
        with pytest.raises(ConfigurationError, match=r"a\.csv has no known format: convert it"):
            find_files(str(tmp_path / path))


BAD = {
    "empty text": ("a.txt", "", r"a\.txt holds no document"),
    "empty jsonl": ("a.jsonl", "\n\n", r"a\.jsonl holds no document"),
    "empty json": ("a.json", "", r"a\.json holds no document"),
    "empty json list": ("a.json", "[]", r"a\.json holds no document"),
    "utf8 text": ("a.txt", b"one\ntwo\nthr\xe9e\n", r"a\.txt, line 3: not valid UTF-8"),
    "utf8 jsonl": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not valid UTF-8"),
    "utf8 json": ("a.json", b'[\n"a",\n"\xff"]', r"a\.json, line 3: not valid UTF-8"),
    "bad json": ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', r"a\.json, line 3: not valid JSON \(Expecting ':'"),
    "bad line": ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3: not valid JSON"),
    "no list": ("a.json", '{"text": "a"}', r"a\.json, line 1: dict where a list of objects or strings is needed"),
    "too deep": ("a.jsonl", "[" * 100_000 + "\n", r"a\.jsonl, line 1: JSON nested too deeply"),
    "no field": (
        "a.json",
        '["x", {"body": "a", "b": 1}]',
        r"record 2: no field 'text' \(it has: b, body\); set text_f",
    ),
    "number": ("a.jsonl", '{"text": "a"}\n{"text": 7}', r"a\.jsonl, line 2: the field 'text' is int, not text"),
    "null": ("a.json", '[{"text": null}]', r"a\.json, record 1: the field 'text' is NoneType, not text"),
    "no record": ("a.jsonl", "3", r"a\.jsonl, line 1: the record is int, not text"),
    "surrogate": ("a.jsonl", '{"text": "\\ud800"}', r"a\.jsonl, line 1: the field 'text' holds half a surrogate pair"),
    "no parquet": ("a.parquet", "text", r"a\.parquet is no readable parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    with pytest.raises(ConfigurationError, match=message):
        list(read_documents(write(tmp_path / name, content), "text"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, r"a\.parquet: no column 'text' \(it has: body\); set text_field"),
        ({"text": ["a", None]}, r"a\.parquet, row 2: the field 'text' is NoneType, not text"),
        ({"text": [1]}, r"a\.parquet, row 1: the field 'text' is int, not text"),
        ({"text": pa.array([], pa.string())}, r"a\.parquet holds no document"),
        ({"text": pa.array([b"a", b"\xff"]).view(pa.string())}, r"a\.parquet, row 2: not valid UTF-8"),
    ],
)
def test_bad_parquet(tmp_path: Path, table: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match=message):
        list(read_documents(tmp_path / "a.parquet", "text"))


def test_vanished_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.txt cannot be read \(No such file"):
        list(read_documents(tmp_path / "gone.txt", "text"))
