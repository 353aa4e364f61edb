"""Iterates over the records of a file of any format, each with its location."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_pipelite.data.columns import plain
from lightning_pipelite.data.formats import TEXT, format_of, open_bytes
from lightning_pipelite.data.json_text import UnreadableError, elements, is_lines, parse
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.wording import counted

Choose = Callable[[list[str]], list[str]]
"""Selects the columns to read from those that a file has."""

_INDEX = "unnamed"  # stands for an unnamed first column, in which pandas writes the row numbers
_LONGEST_CELL = 1 << 30  # Python's default limit for CSV is 128 KiB, less than many documents


class UnreadableFileError(ConfigurationError):
    """A file, or the rest of it, cannot be read."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A record that has not been parsed yet.

    Args:
        read: Returns its value, or raises an error that concerns only this record.
        place: File and line, record or row.
        others: Columns that are not read.
        columns: All columns of a CSV file, because the record omits those that are empty in its row.
    """

    read: Callable[[], Any]
    place: str
    others: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def raw_records(path: Path, choose: Choose | None = None) -> Iterator[Raw]:
    r"""Iterate over the records of one file, in order.

    A text file is one record, with universal newlines (``\r\n`` and ``\r`` become ``\n``). A byte order mark is
    dropped, blank lines in .jsonl are skipped, and .json with one record per line is read like .jsonl. The first row of
    .csv and .tsv names the fields; the delimiter is the comma, semicolon or tab, whichever is most frequent in that
    row.

    Args:
        path: A file with one of the `FORMATS`.
        choose: Which columns of .parquet and .arrow to read; all by default.

    Raises:
        UnreadableFileError: If the file, or the rest of it, is malformed.
    """
    kind = format_of(path)
    if kind in TEXT:
        return _text(path)
    if kind in (".csv", ".tsv"):
        return _csv(path)
    if kind == ".json":
        return _json(path)
    return _jsonl(path) if kind == ".jsonl" else _columns(path, choose or (lambda names: names))


def _text(path: Path) -> Iterator[Raw]:
    with open_bytes(path) as file:
        text = _decode(path, file.read())
    if text:
        yield Raw(lambda: text.replace("\r\n", "\n").replace("\r", "\n"), str(path))


def _json(path: Path) -> Iterator[Raw]:
    with open_bytes(path) as file:
        data = file.read()
    text = data.decode("utf-8-sig", "replace")
    if is_lines(text):
        yield from _lines(path, io.BytesIO(data))
        return
    if "\ufffd" in text:
        try:
            _decode(path, data)
        except ConfigurationError as error:
            raise UnreadableFileError(str(error)) from None
    del data
    if not text.strip():
        return
    try:
        if text.lstrip()[0] == "[":
            for number, element in enumerate(elements(text), start=1):
                yield Raw(partial(_element, path, element.parse), f"{path}, record {number}")
            return
        records = parse(text)
    except UnreadableError as error:
        raise UnreadableFileError(f"{path}, line {error.line + 1}: {error}") from None
    raise UnreadableFileError(
        f"{path}, line 1: expected a list of objects or strings, but found {type(records).__name__}; put the "
        "records into a list, or rename the file to .jsonl if it has one record per line."
    )


def _element(path: Path, read: Callable[[], Any], line: int | None = None) -> Any:
    try:
        return read()
    except UnreadableError as error:
        raise ConfigurationError(f"{path}, line {(error.line + 1) if line is None else line}: {error}") from None


def _jsonl(path: Path) -> Iterator[Raw]:
    with open_bytes(path) as file:
        yield from _lines(path, file)


def _lines(path: Path, lines: Iterable[bytes]) -> Iterator[Raw]:
    for number, line in enumerate(lines, start=1):
        if line.strip():

            def read(line: bytes = line, number: int = number) -> Any:
                text = _decode(path, line, number).strip()
                return _element(path, lambda: parse(text), number)

            yield Raw(read, f"{path}, line {number}")


def _csv(path: Path) -> Iterator[Raw]:
    csv.field_size_limit(_LONGEST_CELL)
    with open_bytes(path) as file:
        # Decoded line by line, so that an error about invalid UTF-8 names the line.
        numbered = enumerate(file, start=1)
        lines = (_decode(path, line, number) for number, line in numbered)
        try:
            first = next(lines, "")
            rows = csv.reader(_chain(first, lines), delimiter=_delimiter(first), strict=True)
            names = next(rows, [])
            if len(names) > 1 and not names[0].strip() and _INDEX not in names:
                names[0] = _INDEX
            if len({*names}) < len(names) or not all(name.strip() for name in names):
                raise UnreadableFileError(
                    f"{path}, line 1: the first row must have a unique name for each column; add the names."
                )
            while True:
                line = rows.line_num + 1
                row = next(rows, None)
                if row is None:
                    return
                if row:
                    place = f"{path}, line {line}"
                    yield Raw(partial(_cells_of, names, row, place), place, columns=tuple(names))
        except csv.Error as error:
            raise UnreadableFileError(
                f"{path}, line {rows.line_num}: not valid CSV ({error}); export it again, with quotes around cells."
            ) from None


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _delimiter(header: str) -> str:
    bare = re.sub(r'"(?:[^"]|"")*"', "", header)  # delimiters within quotes do not count
    return max(",;\t", key=bare.count)


def _cells_of(names: list[str], row: list[str], place: str) -> dict[str, str]:
    if len(row) != len(names):
        cells, columns = counted(len(row), "cell"), counted(len(names), "column")
        raise ConfigurationError(
            f"{place}: {cells}, but the first row names {columns}; put quotes around cells that contain the delimiter."
        )
    return {name: cell for name, cell in zip(names, row, strict=True) if cell}  # CSV cannot tell "" from null


def _columns(path: Path, choose: Choose) -> Iterator[Raw]:
    number = 0
    kind = "parquet" if format_of(path) == ".parquet" else "Arrow"
    try:
        for batch, others in _parquet(path, choose) if kind == "parquet" else _arrow(path, choose):
            for row in zip(*batch.columns, strict=True):
                number += 1
                place = f"{path}, row {number}"
                yield Raw(partial(_values, batch.schema.names, row, place), place, others)
    except pa.ArrowException as error:
        raise UnreadableFileError(f"{path} is not a readable {kind} file ({error}): recreate it.") from error


def _values(names: list[str], row: tuple[pa.Scalar, ...], place: str) -> dict[str, Any]:
    try:
        return {name: plain(value) for name, value in zip(names, row, strict=True)}
    except UnicodeDecodeError:
        raise ConfigurationError(f"{place}: not valid UTF-8; recreate the file.") from None


def _parquet(path: Path, choose: Choose) -> Iterator[tuple[pa.RecordBatch, tuple[str, ...]]]:
    with pq.ParquetFile(path) as file:
        names, others = _chosen(file.schema_arrow.names, choose)
        # In small batches, because a row group of web pages may exceed a gigabyte.
        for batch in file.iter_batches(batch_size=256, columns=names, use_threads=False):
            yield batch, others


def _arrow(path: Path, choose: Choose) -> Iterator[tuple[pa.RecordBatch, tuple[str, ...]]]:
    with pa.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            opened = pa.ipc.open_file(file)
            names, others = _chosen(opened.schema.names, choose)
            for index in range(opened.num_record_batches):
                yield opened.get_batch(index).select(names), others
            return
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        names, others = _chosen(stream.schema.names, choose)
        for batch in stream:
            yield batch.select(names), others


def _chosen(names: list[str], choose: Choose) -> tuple[list[str], tuple[str, ...]]:
    chosen = choose(names)
    return chosen, tuple(name for name in names if name not in chosen)


def _decode(path: Path, data: bytes, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ConfigurationError(f"{path}, line {line}: not valid UTF-8; convert the file to UTF-8.") from None
