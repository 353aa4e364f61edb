"""Determines the split of files from their names, so that training data is never mixed with test data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from lightning_pipelite.data.subsets import same_set, set_key, set_of
from lightning_pipelite.errors import ConfigurationError

_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "holdout": "holdout", "heldout": "holdout",
}  # fmt: skip
_WORD = re.compile(rf"({'|'.join(_WORDS)})(s|sets?|data|splits?|files?)?")
# Separators between the words of a name, including the change of case in testSet.
_BETWEEN = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")
_TITLED = re.compile(r"\.(txt|md)(\.\w+)?$", re.IGNORECASE)
_HELD_OUT = re.compile(r"(hold|held)[\W_]+out(?![a-z])", re.IGNORECASE)


def split_of(file: Path) -> str | None:
    """Return the split that a path indicates, or None: ``train`` for ``train-00000-of-00002.parquet``.

    Every word of a name counts. Folder names take precedence over the file's name.

    Args:
        file: Path relative to what the user has named, so that the names of parent folders do not count.

    Raises:
        ConfigurationError: If the file's name or its folders indicate two splits.
    """
    folder = _one_of("/".join(file.parts[:-1]), file)
    if folder is not None:
        return folder
    return _one_of(file.name, file)


def _one_of(name: str, file: Path) -> str | None:
    told = sorted(_splits_in(name))
    if len(told) > 1:
        raise ConfigurationError(
            f"the name of {file} indicates the splits {' and '.join(told)}, so it is unclear which one it belongs to: "
            "rename it, or give each file to use a dataset_path of its own."
        )
    return told[0] if told else None


def _splits_in(name: str) -> set[str]:
    words = _BETWEEN.split(_HELD_OUT.sub("holdout", name))
    return {_WORDS[match[1]] for word in words if (match := _WORD.fullmatch(word.lower()))}


def begins_with_split(name: str) -> bool:
    """Return whether the first word of a name is a split, as in ``train_sft.txt``, but not in ``my train.txt``."""
    return _BETWEEN.split(_HELD_OUT.sub("holdout", name))[0].lower() in _WORDS


def of_one_split(
    files: Sequence[Path], split: str | None, place: str, *, root: Path, evaluation: bool, named: bool
) -> list[Path]:
    """Choose the files of one split.

    Args:
        files: All files of a dataset.
        split: The split to read; None for the training split, or for evaluation the only other one.
        place: What holds the files, for errors.
        root: The folder that the user has named; names below it may indicate splits.
        evaluation: Whether the files are for evaluation.
        named: Whether the user has named the files with a glob, so that none may be left out silently.

    Raises:
        ConfigurationError: If it is ambiguous which files are meant.
    """
    if split is None and len(files) == 1:
        return list(files)
    sets = _sets(files, root)
    if all(len(parts) == 1 for parts in sets.values()):
        splits = {told: [*chain(*parts.values())] for told, parts in sets.items()}
    else:
        splits = {name: part for parts in sets.values() for name, part in parts.items()}
    names = sorted(name for name in splits if name is not None)
    if split is not None:
        if split in splits:
            return splits[split]
        meant = [part for parts in sets.values() for name, part in parts.items() if name and same_set(name, split)]
        if len(meant) != 1:
            there = f"it has {', '.join(names)}" if names else "its file names indicate none"
            raise ConfigurationError(f"split of {place} is {split}, which does not exist ({there}); correct it.")
        return meant[0]
    if not any(name != "train" for name in names):
        return list(files)
    if None in splits:
        raise ConfigurationError(
            f"{place} has files of the splits {', '.join(names)}, and {splits[None][0].name}, whose name "
            "indicates none; set split to one of them, or set dataset_path to the files to use."
        )
    if not named:
        return splits[choose_split(names, place, evaluation=evaluation)]
    if len(names) > 1 and any("train" in _splits_in(name) for name in names):
        raise ConfigurationError(
            f"{place} matches files of the splits {', '.join(names)}: set split to one of them, or match only its "
            "files; list splits to be used together as separate datasets."
        )
    return list(files)


def _sets(files: Sequence[Path], root: Path) -> dict[str | None, dict[str | None, list[Path]]]:
    """Group files by what their names indicate: the split, and the set within it."""
    sets: dict[str | None, dict[str | None, list[Path]]] = {}
    first: dict[tuple[str | None, tuple[str, ...]], str | None] = {}
    titles = not all(begins_with_split(file.name) for file in files)  # else texts are named after sets, too
    for file in files:
        below = file.relative_to(root)
        told = split_of(below)
        telling = next((part for part in below.parts if _splits_in(part)), None)
        title = titles and telling == below.name and _TITLED.search(telling)  # names a document, not a set
        name = told if telling is None or title else set_of(telling)
        known = first.setdefault((told, set_key(name or "")), name)
        sets.setdefault(told, {}).setdefault(known, []).append(file)
    return sets


def choose_split(names: Sequence[str], place: str, *, evaluation: bool) -> str:
    """Choose one of several splits, if that is unambiguous.

    Raises:
        ConfigurationError: If it is ambiguous; the message names the splits.
    """
    fitting = [name for name in names if ("train" in _splits_in(name)) != evaluation]
    if len(fitting) == 1:
        return fitting[0]
    use = "to evaluate on" if evaluation else "to train on"
    listed = ", ".join(names)
    such_as = f", such as {fitting[0]}" if fitting else ""
    raise ConfigurationError(f"{place} holds the splits {listed}: set split to the one {use}{such_as}.")
