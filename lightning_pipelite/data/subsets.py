"""Which files of a split belong together, by their names: parts of one set do, train_sft and train_gen do not."""

from __future__ import annotations

import re

# As the libraries of Hugging Face name the files of a split; older ones put a hash behind.
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<total>\d{5})(?P<hash>-[0-9a-f]{16})?(\.[A-Za-z]\w*)*")

_ENDINGS = re.compile(r"(\.(txt|md|jsonl?|csv|tsv|parquet|arrow|gz|bz2|xz|zst))+$", re.IGNORECASE)
# What only counts the parts of a set, as 0001, part3 or 2-of-4, also by a hash.
_COUNTS = re.compile(r"(part|shard|chunk|split|file|batch|vol|no|n)?\d*|of|[0-9a-f]{16,}", re.IGNORECASE)
_NUMBER = re.compile(r"(?<=[A-Za-z]{4})\d+$")  # train2 is the second part of train, while v2 is another set than v1


def set_of(name: str) -> str:
    """Give the name of the set that a file or folder is of: without its ending, and without what counts parts.

    Args:
        name: Of the file or folder alone.
    """
    if shard := SHARD.fullmatch(name):
        return shard["split"]
    words = [_NUMBER.sub("", word) for word in _words(without_endings(name)) if not _COUNTS.fullmatch(word)]
    return "_".join(words) or name


def without_endings(name: str) -> str:
    """Give a file's name without what tells of its format and compression."""
    return _ENDINGS.sub("", name)


def same_set(name: str, other: str) -> bool:
    """Tell whether two names are of one set: capitals, and what stands between words, do not count."""
    return set_key(name) == set_key(other)


def set_key(name: str) -> tuple[str, ...]:
    """Give what all names of one set have in common, see `same_set`."""
    return tuple(_words(name.lower()))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name) if word]
