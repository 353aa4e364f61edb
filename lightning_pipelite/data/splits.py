"""Of which split files are, by their names: what is for training is never mixed with what is for testing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lightning_pipelite.errors import ConfigurationError

_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# As the libraries of Hugging Face name the files of a split.
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}$")


def split_of(file: Path) -> str | None:
    """Give the split that a file's name tells, as ``train`` of ``train-00000-of-00002.parquet``; None if it tells none.

    The words for it count where they begin or end the name, or are the name of the folder.
    """
    stem = file.name.split(".")[0]
    if shard := _SHARD.match(stem):
        stem = shard["split"]
        parts = re.split(r"[^A-Za-z]+", stem.lower())
        if any(part in _WORDS for part in parts):  # train_sft and train_gen are two
            return _WORDS.get(stem.lower(), stem)
    parts = [part for part in re.split(r"[^A-Za-z]+", stem.lower()) if part]
    for part in parts[:1] + parts[-1:]:
        if part in _WORDS:
            return _WORDS[part]
    return _WORDS.get(file.parent.name.lower())


def of_one_split(files: Sequence[Path], split: str | None, place: str, *, evaluation: bool, named: bool) -> list[Path]:
    """Choose the files of one split.

    Args:
        files: All of a dataset.
        split: The one to read; None for that for training, or for the only other one in an evaluation.
        place: What holds them, for errors.
        evaluation: Whether they are to evaluate on.
        named: Whether the user has named the files, by a glob, so that those left out would be missed.

    Raises:
        ConfigurationError: If it is not clear which are meant.
    """
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file), []).append(file)
    names = sorted(name for name in splits if name is not None)
    if split is not None:
        if split not in splits:
            there = f"it has {', '.join(names)}" if names else "its files' names tell of none"
            raise ConfigurationError(f"split of {place} is {split}, which is not there ({there}); correct it.")
        return splits[split]
    others = [name for name in names if name != "train"]
    if not others or (named and "train" not in names) or len(files) == 1:
        return list(files)
    if named:
        raise ConfigurationError(
            f"{place} matches files of the splits {', '.join(names)}: set split to one of them, or name its files "
            "alone."
        )
    chosen = choose_split(names, place, evaluation=evaluation)
    if None in splits:
        raise ConfigurationError(
            f"{place} has files of the splits {', '.join(names)}, and {splits[None][0].name}, whose name tells of "
            "none; set split to one of them, or name the files that are meant by dataset_path."
        )
    return splits[chosen]


def choose_split(names: Sequence[str], place: str, *, evaluation: bool) -> str:
    """Choose one of several splits, if there is no doubt.

    Raises:
        ConfigurationError: If there is; the sentence names them.
    """
    fitting = [name for name in names if ("train" in re.split(r"[^a-z]+", name.lower())) != evaluation]
    if len(fitting) == 1:
        return fitting[0]
    use = "to evaluate on" if evaluation else "to train on"
    listed = ", ".join(names)
    raise ConfigurationError(f"{place} holds the splits {listed}: set split to the one {use}, such as {names[0]}.")
