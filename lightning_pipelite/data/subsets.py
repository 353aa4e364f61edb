"""Determines by name which files of a split belong to one set: its parts do, train_sft and train_gen do not."""

from __future__ import annotations

import re

# How Hugging Face's libraries name the files of a split; older versions append a hash.
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<total>\d{5})(?P<hash>-[0-9a-f]{16})?(\.[A-Za-z]\w*)*")

_ENDINGS = re.compile(r"(\.(txt|md|jsonl?|csv|tsv|parquet|arrow|gz|bz2|xz|zst))+$", re.IGNORECASE)
# Words that merely number the parts of a set, such as 0001, part3 or 2-of-4, or identify them by a hash.
_COUNTS = re.compile(r"(part|shard|chunk|split|file|batch|vol|no|n)?\d*|of|[0-9a-f]{16,}", re.IGNORECASE)
_NUMBER = re.compile(r"(?<=[A-Za-z]{4})\d+$")  # train2 is the second part of train, but v1 and v2 are different sets


def set_of(name: str) -> str:
    """Return the name of the set that a file or folder belongs to: its name without extensions and part numbers.

    Args:
        name: Name of the file or folder, without its path.
    """
    if shard := SHARD.fullmatch(name):
        return shard["split"]
    words = [_NUMBER.sub("", word) for word in _words(without_endings(name)) if not _COUNTS.fullmatch(word)]
    return "_".join(words) or name


def without_endings(name: str) -> str:
    """Return a file's name without the extensions for its format and compression."""
    return _ENDINGS.sub("", name)


def same_set(name: str, other: str) -> bool:
    """Return whether two names denote the same set, ignoring case and the separators between words."""
    return set_key(name) == set_key(other)


def set_key(name: str) -> tuple[str, ...]:
    """Return a key that is equal for all names of a set; see `same_set`."""
    return tuple(_words(name.lower()))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name) if word]
