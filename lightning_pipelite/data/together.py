"""Files that would be read together although it may not be meant: the same data twice, or sets that only look alike."""

from __future__ import annotations

import filecmp
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lightning_pipelite.data.folders import folders_not_read, tells_of_data
from lightning_pipelite.data.formats import TEXT, format_of
from lightning_pipelite.data.splits import begins_with_split
from lightning_pipelite.data.subsets import SHARD, set_of, without_endings
from lightning_pipelite.errors import ConfigurationError

# What browsers, file managers and people put behind the name of a copy.
_COPY = re.compile(r"(?P<of>.+?)(( -)? ?\(\d+\)|[\W_]+(copy|kopie|backup|bak|old|orig)([\W_]*\d+\)?)?)", re.IGNORECASE)


def refuse_doubles(files: Sequence[Path], place: str) -> None:
    """Refuse files that by their names hold the same data.

    That are two of a name in different formats or compressions, copies, and parts that were counted twice.

    Args:
        files: All that are to be read.
        place: What holds them, for the message.

    Raises:
        ConfigurationError: If there are two; the sentence names them.
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
    whole = {(file.parent, file.name.lower()): file for file in files}
    for file in files:
        name = without_endings(file.name)
        if copy := _COPY.fullmatch(name):
            original = whole.get((file.parent, f"{copy['of']}{file.name[len(name) :]}".lower()))
            if original is not None:
                _refuse(original, file, place)


def _refuse(one: Path, other: Path, place: str) -> None:
    names = sorted((one.name, other.name))
    raise ConfigurationError(
        f"{place} has {names[0]} and {names[1]}, which by their names are the same data twice: move one of them away, "
        "or name the one that is meant by dataset_path."
    )


def remarks(dataset_path: str, files: list[Path]) -> list[str]:
    """Tell of files that are read with others, or of folders that are not, where something else may be meant.

    Args:
        dataset_path: As in `DatasetConfig`.
        files: All that are read of it.

    Returns:
        Parts of a sentence: texts of several sets of a split, what tells of data, files of records that are equal, and
        folders with data that is not read.
    """
    told = []
    texts = [file for file in files if format_of(file) in TEXT]
    sets = {set_of(file.name): file.name for file in texts if begins_with_split(file.name)}
    if len(sets) > 1:
        told.append(f"{_listed(sorted(sets.values()))} read together")
    about = sorted(file.name for file in files if tells_of_data(file))
    if about and len(files) > 1:
        told.append(f"{_listed(about)} read as data, too")
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        if file not in texts:
            by_size[file.stat().st_size].append(file)
    for same in by_size.values():
        for one, other in itertools.pairwise(same):
            if filecmp.cmp(one, other, shallow=False):
                told.append(f"{one.name} and {other.name} hold the same and are both read")
    if folders := folders_not_read(dataset_path, files):
        told.append(f"folders not read: {_listed(folders)}")
    return told


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
