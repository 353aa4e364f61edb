"""Finds files that may be read together unintentionally: the same data twice, or different sets with similar names."""

from __future__ import annotations

import filecmp
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_pipelite.data.config import DatasetConfig, PackingOptions
from lightning_pipelite.data.folders import folders_not_read, tells_of_data
from lightning_pipelite.data.formats import TEXT, format_of
from lightning_pipelite.data.splits import begins_with_split
from lightning_pipelite.data.subsets import SHARD, set_of, without_endings
from lightning_pipelite.errors import ConfigurationError

# What browsers, file managers and people append or prepend to the name of a copy.
_COPIES = (
    re.compile(
        r"(?P<of>.+?)(( -)? ?\(\d+\)|[\W_]+(copy|kopie|copie|copia|backup|bak|old|orig)([\W_]*\d+\)?)?)", re.IGNORECASE
    ),
    re.compile(r"(copy of|kopie von|copie de|copia de) (?P<of>.+)", re.IGNORECASE),
)


def refuse_doubles(files: Sequence[Path], place: str) -> None:
    """Refuse files that, by their names, hold the same data.

    These are files of the same name in different formats or compressions, copies, links to one another, and shards of
    one set in two numberings.

    Args:
        files: All files to be read.
        place: What holds them, for the message.

    Raises:
        ConfigurationError: If there are two; the message names them.
    """
    first: dict[tuple[Path, str], tuple[str, Path]] = {}
    for file in files:
        name = without_endings(file.name)
        ending = file.name[len(name) :].lower()
        if shard := SHARD.fullmatch(file.name):
            name, ending = shard["split"], f"{shard['total']}{bool(shard['hash'])}{ending}"
        kind, other = first.setdefault((file.parent, name.lower()), (ending, file))
        if kind != ending:
            _refuse(other, file, place)
    named = {(file.parent, without_endings(file.name).lower()): file for file in files}
    for file in files:
        for copy in filter(None, (each.fullmatch(without_endings(file.name)) for each in _COPIES)):
            original = named.get((file.parent, copy["of"].lower()))
            if original is not None:
                _refuse(original, file, place)
    _refuse_links(files, place)


def refuse_nothing_left(options: PackingOptions, found: Sequence[Sequence[Path]]) -> None:
    """Refuse training files if all of them are evaluation files, too, and are read in the same way.

    Identical documents in different files are checked later, when they are packed.

    Args:
        options: The datasets, and how they are read.
        found: The files of each of `PackingOptions.sources`.

    Raises:
        ConfigurationError: If no file is left that is only for training.
    """
    training = len(options.datasets)
    wholly = [
        (_way_of_reading(dataset), {*files})
        for dataset, files in zip(options.eval_datasets, found[training:], strict=True)
        if dataset.max_tokens is None
    ]
    if all(
        any(_way_of_reading(dataset) == way and {*files} <= evaluated for way, evaluated in wholly)
        for dataset, files in zip(options.datasets, found[:training], strict=True)
    ):
        raise nothing_left()


def _way_of_reading(dataset: DatasetConfig) -> DatasetConfig:
    return replace(dataset, dataset_path="", split=None, max_tokens=None, weight=None)


def nothing_left() -> ConfigurationError:
    """Return the error for training documents that are all evaluation documents, too."""
    return ConfigurationError(
        "Every document in data.datasets is also in data.eval_datasets: none is left for training."
    )


def _refuse_links(files: Sequence[Path], place: str) -> None:
    """Refuse files that are the same file, by a link to it or to its folder.

    Two links to a file that is not read itself are not refused; `remarks` reports them.
    """
    folders = {folder: folder.resolve() for folder in {file.parent for file in files}}
    first: dict[Path, Path] = {}
    for file in sorted(files, key=Path.is_symlink):  # files that are not links come first
        real = file.resolve() if (is_link := file.is_symlink()) else folders[file.parent] / file.name
        other = first.get(real) if is_link else first.setdefault(real, file)
        if other not in (None, file):
            _refuse(other, file, place, "are the same file through a link", str)


def _refuse(
    one: Path,
    other: Path,
    place: str,
    why: str = "by their names hold the same data",
    name: Callable[[Path], str] = lambda file: file.name,
) -> None:
    names = sorted((name(one), name(other)))
    raise ConfigurationError(
        f"{place} has {names[0]} and {names[1]}, which {why}: move one of them elsewhere, or set dataset_path "
        "to the one to use."
    )


def remarks(dataset_path: str, files: list[Path]) -> list[str]:
    """Return remarks on files that are read, and folders that are not, although that may be unintended.

    Args:
        dataset_path: As in `DatasetConfig`.
        files: All its files that are read.

    Returns:
        Parts of a sentence, on text files of several sets, documentation that is read as data, record files with
        identical content, and folders whose data is not read.
    """
    told = []
    texts = [file for file in files if format_of(file) in TEXT]
    sets = {set_of(file.name): file.name for file in texts if begins_with_split(file.name)}
    if len(sets) > 1:
        told.append(f"{_listed(sorted(sets.values()))} read together")
    about = sorted(file.name for file in files if tells_of_data(file))
    if about and len(files) > 1:
        told.append(f"{_listed(about)} also read as data")
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        if format_of(file) not in TEXT:
            by_size[file.stat().st_size].append(file)
    for same in by_size.values():
        different: dict[bytes, list[Path]] = defaultdict(list)
        for file in same if len(same) > 1 else ():
            begins_alike = different[_beginning(file)]
            equal = next((each for each in begins_alike if filecmp.cmp(each, file, shallow=False)), None)
            if equal is None:
                begins_alike.append(file)
            else:
                told.append(f"{equal.name} and {file.name} are identical, and both are read")
    if folders := folders_not_read(dataset_path, files):
        told.append(f"folders not read: {_listed(folders)}")
    return told


def read_before(files: list[Path], before: Iterable[tuple[DatasetConfig, list[Path]]]) -> list[str]:
    """Return remarks on files that other datasets read, too.

    Args:
        files: Files of one dataset.
        before: Other datasets with their files.
    """
    told = []
    for dataset, others in before:
        if twice := {*files} & {*others}:
            names = _listed(sorted(file.name for file in twice))
            told.append(f"{names} also read by the dataset {dataset.dataset_path}")
    return told


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
