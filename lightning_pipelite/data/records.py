"""Documents from files, each error with its file and line."""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.sources import format_of, open_bytes
from lightning_pipelite.errors import ConfigurationError

OnBad = Callable[[ConfigurationError], None]


@dataclass(frozen=True, slots=True)
class Record:
    """A document and where it stands.

    Args:
        document: A text, or a conversation: messages, each with a ``role``.
        place: File and line, record or row.
    """

    document: str | list[dict[str, Any]]
    place: str

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
    .jsonl are passed over.

    Args:
        path: A file with one of the `FORMATS`.
        dataset: Says which field or column holds the text or the messages.
        on_bad: Called with what is wrong with a record or with the rest of a file: if the file cannot be read, is not
            UTF-8, is malformed, holds no document, or a record lacks the field or holds something else in it. The
            sentence names the file and the line or record. The record is left out unless `on_bad` raises.

    Yields:
        Each document; a text may be the empty string where a record says so.

    Raises:
        ConfigurationError: By default, what `on_bad` is called with.
    """
    reader = _Reader(path, dataset, on_bad)
    try:
        yield from reader.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        on_bad(ConfigurationError(f"{path} cannot be read ({reason}): check the file."))
    except ConfigurationError as error:  # of the file as a whole
        on_bad(error)
    else:
        if not reader.records:
            on_bad(ConfigurationError(f"{path} holds no document: remove it from the dataset, or fill it."))


class _Reader:
    def __init__(self, path: Path, dataset: DatasetConfig, on_bad: OnBad) -> None:
        self._path = path
        self._messages = dataset.messages_field is not None
        self._option = "messages_field" if self._messages else "text_field"
        self._field = dataset.messages_field or dataset.text_field
        self._on_bad = on_bad
        self.records = 0

    def read(self) -> Iterator[Record]:
        kind = format_of(self._path)
        if kind == ".txt":
            return self._txt()
        if kind == ".json":
            return self._json()
        return self._jsonl() if kind == ".jsonl" else self._columns()

    def _take(self, parse: Callable[[], Any], place: str) -> Iterator[Record]:
        self.records += 1
        try:
            record = Record(self._document(parse(), place), place)
        except ConfigurationError as error:
            self._on_bad(error)
        else:
            yield record

    def _txt(self) -> Iterator[Record]:
        if self._messages:
            raise ConfigurationError(f"{self._path} is text and holds no messages: remove messages_field.")
        with open_bytes(self._path) as file:
            text = self._decode(file.read())
        if text:
            yield from self._take(lambda: text.replace("\r\n", "\n").replace("\r", "\n"), str(self._path))

    def _json(self) -> Iterator[Record]:
        with open_bytes(self._path) as file:
            text = self._decode(file.read())
        if not text.strip():
            return
        records = self._parse(text)
        del text
        if not isinstance(records, list):
            raise ConfigurationError(
                f"{self._path}, line 1: {type(records).__name__} where a list of objects or strings is needed; put the "
                "records into a list, or name the file .jsonl if it has one record a line."
            )
        for number, record in enumerate(records, start=1):
            yield from self._take(lambda record=record: record, f"{self._path}, record {number}")  # type: ignore[misc]

    def _jsonl(self) -> Iterator[Record]:
        with open_bytes(self._path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from self._take(
                        lambda line=line, number=number: self._parse(self._decode(line, number).strip(), number),  # type: ignore[misc]
                        f"{self._path}, line {number}",
                    )

    def _columns(self) -> Iterator[Record]:
        number = 0
        kind = "parquet" if self._path.suffix == ".parquet" else "Arrow"
        try:
            for column in self._parquet() if kind == "parquet" else self._arrow():
                for value in column:
                    number += 1
                    place = f"{self._path}, row {number}"

                    def cell(value: Any = value, place: str = place) -> dict[str, Any]:
                        try:
                            return {self._field: value.as_py()}
                        except UnicodeDecodeError:
                            raise ConfigurationError(f"{place}: not valid UTF-8; write the file anew.") from None

                    yield from self._take(cell, place)
        except pa.ArrowException as error:
            raise ConfigurationError(f"{self._path} is no readable {kind} file ({error}): write it anew.") from error

    def _parquet(self) -> Iterator[pa.Array]:
        with pq.ParquetFile(self._path) as file:
            self._check_column(file.schema_arrow.names)
            # In small batches: a row group of web pages may hold more than a gigabyte.
            for batch in file.iter_batches(batch_size=256, columns=[self._field], use_threads=False):
                yield batch.column(0)

    def _arrow(self) -> Iterator[pa.Array]:
        with pa.OSFile(str(self._path)) as file:
            if file.read(6) == b"ARROW1":
                opened = pa.ipc.open_file(file)
                self._check_column(opened.schema.names)
                for index in range(opened.num_record_batches):
                    yield opened.get_batch(index).column(self._field)
                return
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            self._check_column(stream.schema.names)
            for batch in stream:
                yield batch.column(self._field)

    def _check_column(self, names: list[str]) -> None:
        if self._field not in names:
            raise ConfigurationError(
                f"{self._path}: no column {self._field!r} (it has: {', '.join(names)}); set {self._option} to the "
                "column that holds it."
            )

    def _decode(self, data: bytes, first_line: int = 1) -> str:
        try:
            return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            line = first_line + data.count(b"\n", 0, error.start)
            raise ConfigurationError(
                f"{self._path}, line {line}: not valid UTF-8; convert the file to UTF-8."
            ) from None

    def _parse(self, text: str, first_line: int = 1) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            line = first_line + error.lineno - 1
            raise ConfigurationError(
                f"{self._path}, line {line}: not valid JSON ({error.msg}, column {error.colno}); correct the line."
            ) from None
        except RecursionError:
            raise ConfigurationError(
                f"{self._path}, line {first_line}: JSON nested too deeply; correct the file."
            ) from None

    def _document(self, record: Any, place: str) -> str | list[dict[str, Any]]:
        what = "the record"
        if isinstance(record, dict):
            if self._field not in record:
                fields = ", ".join(sorted(record)) or "none"
                raise ConfigurationError(
                    f"{place}: no field {self._field!r} (it has: {fields}); set {self._option} to the field that holds "
                    "it."
                )
            record = record[self._field]
            what = f"the field {self._field!r}"
        return self._conversation(record, place, what) if self._messages else self._text(record, place, what)

    @staticmethod
    def _text(value: Any, place: str, what: str) -> str:
        if not isinstance(value, str):
            raise ConfigurationError(f"{place}: {what} is {type(value).__name__}, not text; give it a string.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigurationError(
                f"{place}: {what} holds half a surrogate pair, which is no text; repair it."
            ) from None
        return value

    def _conversation(self, value: Any, place: str, what: str) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not value:
            raise ConfigurationError(f"{place}: {what} is no list of messages; give one.")
        for number, message in enumerate(value, start=1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ConfigurationError(f"{place}: message {number} of {what} has no role; give it one.")
            if message.get("content") is not None or not message.get("tool_calls"):
                self._text(message.get("content"), place, f"the content of message {number} of {what}")
        if all(message["role"] != "assistant" for message in value):
            raise ConfigurationError(
                f"{place}: {what} has no message of the assistant, so nothing to learn; remove it."
            )
        # Columns give every message the keys of all; for a chat template a key without a value is not there.
        return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in value]
