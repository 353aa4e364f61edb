"""Statistics of packed documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_pipelite.shared.wording import counted


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of the training set or an evaluation set.

    Args:
        documents: Documents of which at least one token is packed.
        tokens: Their packed tokens, including document prefixes and suffixes, but not sequence prefixes or padding.
        sequences: Packed sequences.
        padding: Share of padding in all positions of the sequences, 0 to 1.
        dropped_tokens: Tokens of this set that `drop_tails` or `max_sequences` left out.
    """

    documents: int
    tokens: int
    sequences: int
    padding: float
    dropped_tokens: int

    @classmethod
    def total(cls, parts: Iterable[SplitStatistics]) -> SplitStatistics:
        """Sum up several sets; all zero if there are none."""
        parts = list(parts)
        sequences = sum(part.sequences for part in parts)
        return cls(
            documents=sum(part.documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            sequences=sequences,
            padding=sum(part.padding * part.sequences for part in parts) / max(1, sequences),
            dropped_tokens=sum(part.dropped_tokens for part in parts),
        )

    def describe(self, sequence_len: int) -> str:
        """Return a one-line description."""
        line = (
            f"{counted(self.documents, 'document')}, {counted(self.tokens, 'token')} in "
            f"{counted(self.sequences, 'sequence')} of {sequence_len:,} "
            f"({self.padding:.1%} padding)"
        )
        return line + (f", {counted(self.dropped_tokens, 'token')} dropped" if self.dropped_tokens else "")


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of one dataset.

    Args:
        dataset_path: As in its `DatasetConfig`.
        documents: Its documents of which at least one token is packed, for training or evaluation.
        tokens: Their packed tokens.
        sequences: Sequences that hold any of them.
        padding: Share of padding in those sequences, 0 to 1.
        unused_documents: Documents that `max_tokens`, `weight`, `max_sequences` or `drop_tails` left out, or that also
            occur in an evaluation dataset.
        skipped: Records that `skip_bad_records` left out.
        first_skipped: The error of the first of them.
        broken_files: The errors of files that it left out, entirely or from some point on.
        ignored_keys: Keys of records that are ignored.
        ignored_files: Files in its directory that are not read, because of another split or an unknown format.
        long: How conversations longer than a sequence were handled.
    """

    dataset_path: str
    documents: int
    tokens: int
    sequences: int
    padding: float
    unused_documents: int
    skipped: int
    first_skipped: str
    broken_files: list[str]
    ignored_keys: list[str]
    ignored_files: list[str]
    long: str = ""

    def describe(self) -> str:
        """Return a one-line description."""
        line = (
            f"{self.dataset_path}: {counted(self.documents, 'document')}, {counted(self.tokens, 'token')} in "
            f"{counted(self.sequences, 'sequence')} ({self.padding:.1%} padding)"
        )
        if self.unused_documents:
            line += f", {counted(self.unused_documents, 'document')} not used"
        if self.skipped:
            line += f", {counted(self.skipped, 'bad record')} skipped (the first: {self.first_skipped})"
        if self.broken_files:
            line += f", {counted(len(self.broken_files), 'file')} not read to the end: {_some(self.broken_files, '; ')}"
        if self.ignored_keys:
            line += f", ignored keys: {_some(self.ignored_keys, ', ')}"
        if self.ignored_files:
            line += f", files not read: {_some(self.ignored_files, ', ')}"
        if self.long:
            line += f", {self.long}"
        return line


@dataclass(frozen=True)
class DataStatistics:
    """Statistics of all sets and all datasets.

    Args:
        train: The training set.
        evals: The evaluation sets by name, in the order of their loaders; may be empty.
        datasets: The datasets, in the order of `datasets` and then `eval_datasets`.
    """

    train: SplitStatistics
    evals: dict[str, SplitStatistics]
    datasets: list[DatasetStatistics]

    @property
    def eval(self) -> SplitStatistics:
        """All evaluation sets together."""
        return SplitStatistics.total(self.evals.values())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataStatistics:
        """Create statistics from the result of `as_dict`.

        Raises:
            TypeError, KeyError: If it is anything else.
        """
        return cls(
            train=SplitStatistics(**values["train"]),
            evals={name: SplitStatistics(**each) for name, each in values["evals"].items()},
            datasets=[DatasetStatistics(**each) for each in values["datasets"]],
        )


def _some(names: list[str], separator: str) -> str:
    """Join as many names as fit in a line."""
    shown = separator.join(names[:12])
    return f"{shown} and {len(names) - 12:,} more" if len(names) > 12 else shown
