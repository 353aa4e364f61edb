"""What packing made of the documents, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitStatistics:
    """The training or the evaluation set.

    Args:
        documents: Documents of which at least one token is packed.
        tokens: Their packed tokens, document prefixes and suffixes included, sequence prefixes and padding not.
        sequences: Packed sequences.
        padding: Share of padding in all positions of the sequences, 0 to 1.
        dropped_tokens: Tokens of this set that `drop_tails` or `max_sequences` left out.
    """

    documents: int
    tokens: int
    sequences: int
    padding: float
    dropped_tokens: int

    def describe(self, sequence_len: int) -> str:
        """Say it in a line."""
        line = (
            f"{self.documents:,} documents, {self.tokens:,} tokens in {self.sequences:,} sequences of {sequence_len:,} "
            f"({self.padding:.1%} padding)"
        )
        return line + (f", {self.dropped_tokens:,} tokens dropped" if self.dropped_tokens else "")


@dataclass(frozen=True)
class DataStatistics:
    """Both sets.

    Args:
        train: The training set.
        eval: The evaluation set, all zero if there is none.
    """

    train: SplitStatistics
    eval: SplitStatistics
