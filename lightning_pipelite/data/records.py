"""Reads documents from files; every error names the file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.conversation import check_text, check_weights, known_keys, template_arguments
from lightning_pipelite.data.field_names import readable, said_fields, vocabulary
from lightning_pipelite.data.files import Raw, UnreadableFileError, raw_records
from lightning_pipelite.data.finding import check_text_file, find_shape, shape_of
from lightning_pipelite.data.formats import COLUMNS, TEXT, format_of
from lightning_pipelite.data.marks import check_marks, check_prompt
from lightning_pipelite.data.record_errors import reason
from lightning_pipelite.data.shapes import Document, Shape
from lightning_pipelite.errors import ConfigurationError

__all__ = ["OnBad", "Record", "UnreadableFileError", "read_records", "refuse"]

OnBad = Callable[[ConfigurationError], None]


@dataclass(frozen=True, slots=True)
class Record:
    """A document and its location.

    Args:
        document: A text, or a conversation: messages, each with a ``role``.
        place: File and line, record or row.
        arguments: For a conversation, the record's arguments for the chat template besides the messages.
        others: Keys of the record without a known meaning.
    """

    document: Document
    place: str
    arguments: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of characters of the document."""
        if isinstance(self.document, str):
            return len(self.document)
        return sum(len(message.get("content") or "") for message in self.document)


def refuse(error: ConfigurationError) -> None:
    """Raise the error, so that a bad record ends the reading."""
    raise error


def read_records(
    path: Path, dataset: DatasetConfig, on_bad: OnBad = refuse, shape: Shape | None = None
) -> Iterator[Record]:
    """Read the documents of one file, in order; see `raw_records`.

    Args:
        path: A file with one of the `FORMATS`.
        dataset: The user's options for its records.
        on_bad: Called with the error of each record that is malformed, lacks a field or has a field of the wrong type.
            The message names the file and the line or record. The record is left out unless `on_bad` raises. Also
            called for a file without documents, and with an `UnreadableFileError` for a file, or the rest of one, that
            cannot be read, is not UTF-8 or is malformed.
        shape: How its records become documents; by default, `find_shape` determines it.

    Yields:
        Each document; a text may be empty if the record's field is.

    Raises:
        ConfigurationError: By default, the errors that `on_bad` is called with.
    """
    records = 0
    try:
        if format_of(path) in TEXT:
            check_text_file(path, dataset)
        reader = _Reader(path, dataset, shape or find_shape(path, dataset))
        for raw in raw_records(path, reader.choose):
            records += 1
            try:
                record = reader.record(raw)
            except ConfigurationError as error:
                on_bad(error)
            except Exception as error:
                on_bad(ConfigurationError(f"{raw.place}: cannot be read ({reason(error)}); correct it."))
            else:
                yield record
    except ConfigurationError as error:  # from a record that must not be skipped, or from the file as a whole
        on_bad(error)
    except Exception as error:  # decompressors and pyarrow raise many types of exceptions
        said = getattr(error, "strerror", None) or reason(error)
        on_bad(UnreadableFileError(f"{path} cannot be read ({said}): check the file."))
    else:
        if not records:
            on_bad(ConfigurationError(f"{path} contains no documents: remove it from the dataset, or add some."))


class _Reader:
    def __init__(self, path: Path, dataset: DatasetConfig, shape: Shape) -> None:
        self._path = path
        self._dataset = dataset
        self._shape = shape
        self._known = {*known_keys(shape.conversation), *shape.fields}
        self._names: dict[tuple[tuple[str, ...], ...], tuple[str, ...]] = {}

    def choose(self, names: list[str]) -> list[str]:
        """Return the columns to read, including those that would change how a record is interpreted."""
        for name in self._shape.needed:
            if name not in names:
                raise UnreadableFileError(
                    f"{self._path}: no column {name!r} (found: {', '.join(names)}); {self._remedy(name)}."
                )
        text = self._shape.given and not self._shape.conversation
        meant = self._known if text else self._known.union(vocabulary())
        return [name for name in names if name in meant]

    def record(self, raw: Raw) -> Record:
        record, place, shape = raw.read(), raw.place, self._shape
        if not isinstance(record, dict):
            if not isinstance(record, str):
                raise ConfigurationError(
                    f"{place}: the record must be an object or a string, not {type(record).__name__}."
                )
            if shape.conversation:
                raise ConfigurationError(f"{place}: the record is text, not a conversation; move it to another file.")
            check_text(record, place, "the record")
            return Record(record, place)
        if shape.question and shape.question[0] in raw.columns:
            record.setdefault(shape.question[0], "")  # the input may be the whole question
        others = self._checked(record, place) + raw.others
        check_weights(record, place)
        for name in shape.needed:
            if name not in record:
                fields = ", ".join(sorted(map(readable, record))) or "none"
                raise ConfigurationError(f"{place}: no field {name!r} (found: {fields}); {self._remedy(name)}.")
        document = shape.document(record, place)
        return Record(document, place, template_arguments(record, place) if shape.conversation else {}, others)

    def _remedy(self, name: str) -> str:
        shape = self._shape
        option = "text_field" if name == shape.text else "messages_field" if name == shape.messages else None
        option = option or ("answer_field" if name == shape.answer else "question_field")
        others = "" if shape.given else ", or set messages_field, or question_field and answer_field, instead"
        return f"set {option} to the {'column' if format_of(self._path) in COLUMNS else 'field'} that holds it{others}"

    def _checked(self, record: Mapping[str, Any], place: str) -> tuple[str, ...]:
        """Refuse a record whose fields give it another shape; return its keys without a known meaning."""
        shape, said = self._shape, said_fields(record)
        check_marks(said, shape, self._dataset, place)
        check_prompt(said, shape, self._dataset, place)
        names = tuple(name for name, value in record.items() if value is not None and name not in self._known)
        there = (names, tuple(said))
        if there not in self._names:
            if all(name in record for name in shape.needed):
                known = (*shape.needed, *(name for name in said if name in self._known or name in names))
                found = shape_of({name: record[name] for name in known}, self._dataset, place)
                if found.needed != shape.needed:
                    raise ConfigurationError(
                        f"{place}: the record has a different format from the first ones ({found}, not {shape}); move "
                        "it to another file."
                    )
                late = next((name for name in found.fields if name in said and name not in shape.fields), None)
                if late is not None:
                    raise ConfigurationError(
                        f"{place}: none of the first records of the file has the field {late!r}, so it is not read; "
                        "add it to the first record, even if empty."
                    )
            self._names[there] = tuple(map(readable, names))
        return self._names[there]  # one shared tuple for all records, because they are sent to other processes
