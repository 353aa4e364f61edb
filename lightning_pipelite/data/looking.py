"""Examines the data: which files there are, their record formats, and whether the first records can be read.

Imports nothing slow, so that the command line can run it before importing torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_pipelite.data.config import DatasetConfig, PackingOptions
from lightning_pipelite.data.finding import find_shape
from lightning_pipelite.data.formats import COMPRESSIONS, READ_WHOLE, TEXT, format_of
from lightning_pipelite.data.records import read_records
from lightning_pipelite.data.shapes import Shape
from lightning_pipelite.data.sources import find_files
from lightning_pipelite.data.templates import no_template, surely_has_none
from lightning_pipelite.data.together import read_before, refuse_doubles, refuse_nothing_left, remarks
from lightning_pipelite.data.token_ids import first_check
from lightning_pipelite.errors import ConfigurationError

# Limits of the first look, which takes some tenths of a second. Everything is read later.
_FILES = 20
_RECORDS = 50
_BYTES = 1 << 24  # size of a file that is read as a whole
_COMPRESSED_BYTES = 1 << 19  # its size if compressed


def find_all(options: PackingOptions) -> list[list[Path]]:
    """Return the files of each of `options.sources`.

    Raises:
        ConfigurationError: If a dataset has no files, it is ambiguous which are meant, they hold the same data twice,
            or all training files are evaluation files, too.
    """
    training = len(options.datasets)
    found = []
    for number, dataset in enumerate(options.sources):
        files = find_files(dataset.dataset_path, dataset.split, evaluation=number >= training)
        refuse_doubles(files, dataset.dataset_path)
        found.append(files)
    refuse_nothing_left(options, found)
    return found


def look_at(options: PackingOptions) -> PackingOptions:
    """Return the options with `shapes` set, by reading the first records of each file.

    Raises:
        ConfigurationError: If files cannot be found, or it is ambiguous how their records become documents.
    """
    if options.shapes is not None:
        return options
    found = zip(options.sources, find_all(options), strict=True)
    return replace(options, shapes=tuple(_shapes(dataset, paths, paths) for dataset, paths in found))


def what_is_found(options: PackingOptions) -> list[str]:
    """Return one line per dataset with its record formats, and remarks on files that may be unintended.

    Args:
        options: As returned by `look_at`.
    """
    assert options.shapes is not None
    found = find_all(options)
    told = []
    for number, (dataset, shapes, paths) in enumerate(zip(options.sources, options.shapes, found, strict=True)):
        before = zip(options.datasets[:number], found, strict=False) if number < len(options.datasets) else ()
        parts = [_kinds(shapes, paths), *remarks(dataset.dataset_path, paths), *read_before(paths, before)]
        told.append("; ".join([f"{dataset.dataset_path}: {parts[0]}", *parts[1:]]))
    return told


def _kinds(shapes: Sequence[Shape], paths: list[Path]) -> str:
    """Return the record format of files; if there are several, each with the files that have it."""
    names: dict[str, list[str]] = {}
    for shape, path in zip(shapes, paths, strict=True):
        names.setdefault(str(shape), []).append(path.name)
    if len(names) == 1:
        return next(iter(names))
    some = ((kind, each[0], len(each) - 1) for kind, each in names.items())
    return " | ".join(f"{kind} ({first}{f' and {more:,} more' if more else ''})" for kind, first, more in some)


def first_look(options: PackingOptions, tokenizer_dir: Path | None = None) -> None:
    """Check the first records of the first files, skipping files that are slow to open.

    Args:
        options: What will be packed.
        tokenizer_dir: Directory of the tokenizer, if known.

    Raises:
        ConfigurationError: If files cannot be found, or it is ambiguous how their records become documents; if one of
            those records is bad, unless `PackingOptions.skip_bad_records` is set; if there are conversations but
            certainly no template; or if a given id is certainly not one of the tokenizer's.
    """
    looked_at = []
    for dataset, paths in zip(options.sources, find_all(options), strict=True):
        first = [*itertools.islice(filter(_opens_soon, paths), _FILES)]
        looked_at += [(dataset, *pair) for pair in zip(first, _shapes(dataset, first, paths), strict=True)]
    conversations = any(shape.conversation for _, _, shape in looked_at)
    if conversations and options.chat_template is None and tokenizer_dir is not None and surely_has_none(tokenizer_dir):
        raise no_template(tokenizer_dir)
    if tokenizer_dir is not None:
        first_check(options, tokenizer_dir)
    if not options.skip_bad_records:
        for dataset, path, shape in looked_at:
            for _ in itertools.islice(read_records(path, dataset, shape=shape), _RECORDS):
                pass


def _opens_soon(path: Path) -> bool:
    limit = _COMPRESSED_BYTES if path.suffix.lower() in COMPRESSIONS else _BYTES
    return format_of(path) not in READ_WHOLE or path.stat().st_size <= limit


def _shapes(dataset: DatasetConfig, paths: Iterable[Path], all_paths: list[Path]) -> tuple[Shape, ...]:
    # The content of a text file counts as the field "text", so that name is allowed.
    if dataset.text_field not in (None, "text") and all(format_of(path) in TEXT for path in all_paths):
        raise ConfigurationError(
            f"{dataset.dataset_path} is text, which has no fields: remove text_field, or name files that have them."
        )
    return tuple(find_shape(path, dataset) for path in paths)
