"""Documents from files, each error with its file and line."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_pipelite.data.columns import plain
from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.conversation import (
    check_messages,
    check_text,
    check_weights,
    known_keys,
    template_arguments,
)
from lightning_pipelite.data.json_text import UnreadableError, elements, is_lines, parse
from lightning_pipelite.data.record_errors import reason
from lightning_pipelite.data.sources import format_of, open_bytes
from lightning_pipelite.errors import ConfigurationError

OnBad = Callable[[ConfigurationError], None]


class UnreadableFileError(ConfigurationError):
    """A file, or all that follows in it, is not read."""


@dataclass(frozen=True, slots=True)
class Record:
    """A document and where it stands.

    Args:
        document: A text, or a conversation: messages, each with a ``role``.
        place: File and line, record or row.
        arguments: Of a conversation, what the record has for the chat template beside the messages.
        others: Keys of the record that are not known to mean anything.
    """

    document: str | list[dict[str, Any]]
    place: str
    arguments: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Characters of the document."""
        if isinstance(self.document, str):
            return len(self.document)
        return sum(len(message.get("content") or "") for message in self.document)


def refuse(error: ConfigurationError) -> None:
    """Let a bad record end the reading."""
    raise error


def read_records(path: Path, dataset: DatasetConfig, on_bad: OnBad = refuse) -> Iterator[Record]:
    """Read the documents of one file, in order.

    Text files count as one document each, with universal newlines (``\\r\\n`` and ``\\r`` become ``\\n``). A record of
    .json and .jsonl is an object with the dataset's field, or a string. A byte order mark is dropped, blank lines of
    .jsonl are passed over, and .json that has a record a line is read as .jsonl is.

    Args:
        path: A file with one of the `FORMATS`.
        dataset: Says which field or column holds the text or the messages.
        on_bad: Called with what is wrong with a record: if it is malformed, or lacks the field or holds something else
            in it. The sentence names the file and the line or record. The record is left out unless `on_bad` raises.
            Called for a file without a document, too, and with an `UnreadableFileError` for a file, or the rest
            of one, that cannot be read, is not UTF-8 or is malformed.

    Yields:
        Each document; a text may be the empty string where a record says so.

    Raises:
        ConfigurationError: By default, what `on_bad` is called with.
    """
    reader = _Reader(path, dataset, on_bad)
    try:
        yield from reader.read()
    except ConfigurationError as error:  # of a record that is not to be skipped, or of the file as a whole
        on_bad(error)
    except Exception as error:  # decompressors and pyarrow raise whatever they do
        said = getattr(error, "strerror", None) or reason(error)
        on_bad(UnreadableFileError(f"{path} cannot be read ({said}): check the file."))
    else:
        if not reader.records:
            on_bad(ConfigurationError(f"{path} holds no document: remove it from the dataset, or fill it."))


class _Reader:
    def __init__(self, path: Path, dataset: DatasetConfig, on_bad: OnBad) -> None:
        self._path = path
        self._messages = dataset.messages_field is not None
        self._option = "messages_field" if self._messages else "text_field"
        self._field = dataset.messages_field or dataset.text_field
        self._known = known_keys(self._messages)
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._on_bad = on_bad
        self.records = 0

    def read(self) -> Iterator[Record]:
        kind = format_of(self._path)
        if kind == ".txt":
            return self._txt()
        if kind == ".json":
            return self._json()
        return self._jsonl() if kind == ".jsonl" else self._columns()

    def _take(self, read: Callable[[], Any], place: str, others: tuple[str, ...] = ()) -> Iterator[Record]:
        self.records += 1
        try:
            record = self._record(read(), place, others)
        except ConfigurationError as error:
            self._on_bad(error)
        except UnreadableError as error:
            self._on_bad(ConfigurationError(f"{self._path}, line {error.line + 1}: {error}"))
        except Exception as error:
            self._on_bad(ConfigurationError(f"{place}: cannot be read ({reason(error)}); correct it."))
        else:
            yield record

    def _txt(self) -> Iterator[Record]:
        if self._messages:
            raise UnreadableFileError(f"{self._path} is text and holds no messages: remove messages_field.")
        with open_bytes(self._path) as file:
            text = self._decode(file.read())
        if text:
            yield from self._take(lambda: text.replace("\r\n", "\n").replace("\r", "\n"), str(self._path))

    def _json(self) -> Iterator[Record]:
        with open_bytes(self._path) as file:
            data = file.read()
        text = data.decode("utf-8-sig", "replace")
        if is_lines(text):
            yield from self._lines(io.BytesIO(data))
            return
        if "\ufffd" in text:
            try:
                self._decode(data)
            except ConfigurationError as error:
                raise UnreadableFileError(str(error)) from None
        del data
        if not text.strip():
            return
        try:
            if text.lstrip()[0] == "[":
                for number, element in enumerate(elements(text), start=1):
                    yield from self._take(element.parse, f"{self._path}, record {number}")
                return
            records = parse(text)
        except UnreadableError as error:
            raise UnreadableFileError(f"{self._path}, line {error.line + 1}: {error}") from None
        raise UnreadableFileError(
            f"{self._path}, line 1: {type(records).__name__} where a list of objects or strings is needed; put the "
            "records into a list, or name the file .jsonl if it has one record a line."
        )

    def _jsonl(self) -> Iterator[Record]:
        with open_bytes(self._path) as file:
            yield from self._lines(file)

    def _lines(self, lines: Iterable[bytes]) -> Iterator[Record]:
        for number, line in enumerate(lines, start=1):
            if line.strip():

                def read(line: bytes = line, number: int = number) -> Any:
                    text = self._decode(line, number).strip()
                    try:
                        return parse(text)
                    except UnreadableError as error:
                        error.line = number - 1
                        raise

                yield from self._take(read, f"{self._path}, line {number}")

    def _columns(self) -> Iterator[Record]:
        number = 0
        kind = "parquet" if self._path.suffix == ".parquet" else "Arrow"
        try:
            for batch, others in self._parquet() if kind == "parquet" else self._arrow():
                for row in zip(*batch.columns, strict=True):
                    number += 1
                    place = f"{self._path}, row {number}"
                    cells = partial(self._cells, batch.schema.names, row, place)
                    yield from self._take(cells, place, others)
        except pa.ArrowException as error:
            raise UnreadableFileError(f"{self._path} is no readable {kind} file ({error}): write it anew.") from error

    @staticmethod
    def _cells(names: list[str], row: tuple[pa.Scalar, ...], place: str) -> dict[str, Any]:
        try:
            return {name: plain(value) for name, value in zip(names, row, strict=True)}
        except UnicodeDecodeError:
            raise ConfigurationError(f"{place}: not valid UTF-8; write the file anew.") from None

    def _parquet(self) -> Iterator[tuple[pa.RecordBatch, tuple[str, ...]]]:
        with pq.ParquetFile(self._path) as file:
            names, others = self._choose(file.schema_arrow.names)
            # In small batches: a row group of web pages may hold more than a gigabyte.
            for batch in file.iter_batches(batch_size=256, columns=names, use_threads=False):
                yield batch, others

    def _arrow(self) -> Iterator[tuple[pa.RecordBatch, tuple[str, ...]]]:
        with pa.OSFile(str(self._path)) as file:
            if file.read(6) == b"ARROW1":
                opened = pa.ipc.open_file(file)
                names, others = self._choose(opened.schema.names)
                for index in range(opened.num_record_batches):
                    yield opened.get_batch(index).select(names), others
                return
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            names, others = self._choose(stream.schema.names)
            for batch in stream:
                yield batch.select(names), others

    def _choose(self, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
        """The columns to read, and the others."""
        if self._field not in names:
            raise UnreadableFileError(
                f"{self._path}: no column {self._field!r} (it has: {', '.join(names)}); set {self._option} to the "
                "column that holds it."
            )
        chosen = [name for name in names if name == self._field or name in self._known]
        return chosen, tuple(name for name in names if name not in chosen)

    def _decode(self, data: bytes, first_line: int = 1) -> str:
        try:
            return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            line = first_line + data.count(b"\n", 0, error.start)
            raise ConfigurationError(
                f"{self._path}, line {line}: not valid UTF-8; convert the file to UTF-8."
            ) from None

    def _record(self, record: Any, place: str, others: tuple[str, ...]) -> Record:
        value, what, keys = record, "the record", {}
        if isinstance(record, dict):
            keys = record
            if self._field not in record:
                fields = ", ".join(sorted(map(_readable, record))) or "none"
                raise ConfigurationError(
                    f"{place}: no field {self._field!r} (it has: {fields}); set {self._option} to the field that holds "
                    "it."
                )
            value, what = record[self._field], f"the field {self._field!r}"
            others = others or self._others(record)
            check_weights(record, place)
        if self._messages:
            return Record(check_messages(value, place, what), place, template_arguments(keys, place), others)
        if not isinstance(value, str):
            raise ConfigurationError(f"{place}: {what} is {type(value).__name__}, not text; give it a string.")
        check_text(value, place, what)
        return Record(value, place, {}, others)

    def _others(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        names = tuple(
            _readable(name)
            for name, value in record.items()
            if value is not None and name != self._field and name not in self._known
        )
        return self._names.setdefault(names, names)  # one for all records: they are sent to other processes


def _readable(name: str) -> str:
    """A key as it can be shown: on one line, short, and without half a surrogate pair, which no terminal takes."""
    shown = name if name.isprintable() else name.encode("unicode_escape").decode()
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
