"""Documents from text files, each error with its file and line."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_pipelite.errors import ConfigurationError

FORMATS = (".txt", ".json", ".jsonl", ".parquet")


def find_files(dataset_path: str) -> list[Path]:
    """Resolve a file, directory or glob to its files.

    Args:
        dataset_path: As in `DatasetConfig`; ``~`` stands for the home directory.

    Returns:
        Absolute paths in order of name, each once.

    Raises:
        ConfigurationError: If nothing is found, or a file named by it has none of the formats.
    """
    path = Path(dataset_path).expanduser()
    if path.is_dir():
        # What else lies in a directory (a README, a cache) is not meant as data; what a glob names is.
        files = [file for file in path.iterdir() if file.is_file() and file.suffix in FORMATS]
    elif path.is_file():
        files = [path]
    else:
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        raise ConfigurationError(
            f"dataset_path {dataset_path} matches no file: name a file, a directory or a glob of {', '.join(FORMATS)}."
        )
    for file in files:
        if file.suffix not in FORMATS:
            raise ConfigurationError(f"{file} has no known format: convert it to one of {', '.join(FORMATS)}.")
    return sorted({file.absolute() for file in files})


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """Read the documents of one file, in order.

    Text files count as one document each, with universal newlines (``\\r\\n`` and ``\\r`` become ``\\n``). A record of
    .json and .jsonl is an object with `text_field`, or a string. A byte order mark is dropped, blank lines of .jsonl
    are passed over.

    Args:
        path: A file with one of the `FORMATS`.
        text_field: The field or column that holds the text.

    Yields:
        The text of each document; it may be the empty string where a record says so.

    Raises:
        ConfigurationError: If the file cannot be read, is not UTF-8, is malformed, holds no document, or a record lacks
            the field or holds something else than text in it. The sentence names the file and the line or record.
    """
    readers = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    empty = True
    try:
        for text in readers[path.suffix](path, text_field):
            empty = False
            yield text
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error
    if empty:
        raise ConfigurationError(f"{path} holds no document: remove it from the dataset, or fill it.")


def _decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ConfigurationError(f"{path}, line {line}: not valid UTF-8; convert the file to UTF-8.") from None


def _parse(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ConfigurationError(
            f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno}); correct the line."
        ) from None
    except RecursionError:
        raise ConfigurationError(f"{path}, line {first_line}: JSON nested too deeply; correct the file.") from None


def _text_of(record: Any, text_field: str, place: str) -> str:
    if isinstance(record, dict):
        if text_field not in record:
            fields = ", ".join(sorted(record)) or "none"
            raise ConfigurationError(
                f"{place}: no field {text_field!r} (it has: {fields}); set text_field to the field that holds the text."
            )
        record = record[text_field]
        what = f"the field {text_field!r}"
    else:
        what = "the record"
    if not isinstance(record, str):
        raise ConfigurationError(f"{place}: {what} is {type(record).__name__}, not text; give it a string.")
    try:
        record.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{place}: {what} holds half a surrogate pair, which is no text; repair it.") from None
    return record


def _read_txt(path: Path, text_field: str) -> Iterator[str]:
    text = _decode(path.read_bytes(), path)
    if text:
        yield text.replace("\r\n", "\n").replace("\r", "\n")


def _read_json(path: Path, text_field: str) -> Iterator[str]:
    text = _decode(path.read_bytes(), path)
    if not text.strip():
        return
    records = _parse(text, path)
    if not isinstance(records, list):
        raise ConfigurationError(
            f"{path}, line 1: {type(records).__name__} where a list of objects or strings is needed; put the records "
            "into a list, or name the file .jsonl if it has one record a line."
        )
    for number, record in enumerate(records, start=1):
        yield _text_of(record, text_field, f"{path}, record {number}")


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number).strip()
            if text:
                yield _text_of(_parse(text, path, number), text_field, f"{path}, line {number}")


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise ConfigurationError(
                    f"{path}: no column {text_field!r} (it has: {', '.join(names)}); set text_field to the column that "
                    "holds the text."
                )
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for record in batch.column(0):
                    number += 1
                    yield _text_of({text_field: record.as_py()}, text_field, f"{path}, row {number}")
    except pa.ArrowException as error:
        raise ConfigurationError(f"{path} is no readable parquet file ({error}): write it anew.") from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}, row {number}: not valid UTF-8; write the file anew.") from None
