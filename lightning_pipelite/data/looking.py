"""A look at the data: which files there are, what their records are, and whether the first of them can be read.

Nothing long is imported for it, so that the command line looks before it imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lightning_pipelite.data.config import DatasetConfig, PackingOptions
from lightning_pipelite.data.finding import find_shape
from lightning_pipelite.data.records import read_records
from lightning_pipelite.data.shapes import Shape
from lightning_pipelite.data.sources import READ_WHOLE, TEXT, find_files, format_of
from lightning_pipelite.errors import ConfigurationError

# What is read before anything else: some tenths of a second. All is read later.
_FILES = 20
_RECORDS = 50
_BYTES = 1 << 24  # of a file that is read as a whole


def find_all(options: PackingOptions) -> list[list[Path]]:
    """Give the files of each of `options.sources`.

    Raises:
        ConfigurationError: If one has none, or it is not clear which are meant.
    """
    training = len(options.datasets)
    return [
        find_files(dataset.dataset_path, dataset.split, evaluation=number >= training)
        for number, dataset in enumerate(options.sources)
    ]


def look_at(options: PackingOptions) -> PackingOptions:
    """Give options that know what the records of their files are; the first of each file are read.

    Raises:
        ConfigurationError: If files cannot be found, or it is not clear how their records become documents.
    """
    if options.shapes is not None:
        return options
    found = zip(options.sources, find_all(options), strict=True)
    return replace(options, shapes=tuple(_shapes(dataset, paths, paths) for dataset, paths in found))


def first_look(options: PackingOptions) -> None:
    """Read the first records of the first files as they will be read; not of files that take long to open.

    Raises:
        ConfigurationError: If files cannot be found, it is not clear how their records become documents, or one of
            those records is bad, unless `PackingOptions.skip_bad_records` is set.
    """
    for dataset, paths in zip(options.sources, find_all(options), strict=True):
        first = [path for path in paths if format_of(path) not in READ_WHOLE or path.stat().st_size <= _BYTES][:_FILES]
        for path, shape in zip(first, _shapes(dataset, first, paths), strict=True):
            if not options.skip_bad_records:
                for _ in itertools.islice(read_records(path, dataset, shape=shape), _RECORDS):
                    pass


def _shapes(dataset: DatasetConfig, paths: Iterable[Path], all_paths: list[Path]) -> tuple[Shape, ...]:
    # What a text file holds is called text here, too; so it may be named.
    if dataset.text_field not in (None, "text") and all(format_of(path) in TEXT for path in all_paths):
        raise ConfigurationError(
            f"{dataset.dataset_path} is text and has no fields: remove text_field, or name files that have."
        )
    return tuple(find_shape(path, dataset) for path in paths)
