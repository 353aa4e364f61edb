"""A look at the data: which files there are, what their records are, and whether the first of them can be read.

Nothing long is imported for it, so that the command line looks before it imports torch.
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

# What is read before anything else: some tenths of a second. All is read later.
_FILES = 20
_RECORDS = 50
_BYTES = 1 << 24  # of a file that is read as a whole
_COMPRESSED_BYTES = 1 << 19  # of one that is more when it is opened


def find_all(options: PackingOptions) -> list[list[Path]]:
    """Give the files of each of `options.sources`.

    Raises:
        ConfigurationError: If one has none, it is not clear which are meant, they hold the same data twice, or all that
            are for training are for evaluation, too.
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
    """Give options that know what the records of their files are; the first of each file are read.

    Raises:
        ConfigurationError: If files cannot be found, or it is not clear how their records become documents.
    """
    if options.shapes is not None:
        return options
    found = zip(options.sources, find_all(options), strict=True)
    return replace(options, shapes=tuple(_shapes(dataset, paths, paths) for dataset, paths in found))


def what_is_found(options: PackingOptions) -> list[str]:
    """Tell in a line for each dataset what its records are, and what of its files may not be meant.

    Args:
        options: Looked at.
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
    """Say what files hold; if it is not one thing, in which."""
    names: dict[str, list[str]] = {}
    for shape, path in zip(shapes, paths, strict=True):
        names.setdefault(str(shape), []).append(path.name)
    if len(names) == 1:
        return next(iter(names))
    some = ((kind, each[0], len(each) - 1) for kind, each in names.items())
    return " | ".join(f"{kind} ({first}{f' and {more:,} more' if more else ''})" for kind, first, more in some)


def first_look(options: PackingOptions, tokenizer_dir: Path | None = None) -> None:
    """Read the first records of the first files as they will be read; not of files that take long to open.

    Args:
        options: What will be packed.
        tokenizer_dir: Where the tokenizer is, if that is known.

    Raises:
        ConfigurationError: If files cannot be found, it is not clear how their records become documents, or one of
            those records is bad, unless `PackingOptions.skip_bad_records` is set; if there are conversations and
            surely no template; or if an id that is given is surely none of the tokenizer's.
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
    # What a text file holds is called text here, too; so it may be named.
    if dataset.text_field not in (None, "text") and all(format_of(path) in TEXT for path in all_paths):
        raise ConfigurationError(
            f"{dataset.dataset_path} is text and has no fields: remove text_field, or name files that have."
        )
    return tuple(find_shape(path, dataset) for path in paths)
