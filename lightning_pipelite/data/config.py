"""What a user sets about the data, checked before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_pipelite.errors import ConfigurationError

TokenSpec = int | str | list[int] | None
"""Tokens as a user writes them: an id, a text, a list of ids, or none for the option's default."""

MaskSpec = bool | int | list[int] | None
"""Tokens to mask: true for all special tokens, an id, a list of ids; none or false for no token."""


@dataclass
class DatasetConfig:
    """One source of documents.

    Args:
        dataset_path: A file, a directory (the files directly in it) or a glob (``**`` crosses directories) of
            ``.txt`` (a document a file), ``.json`` (a list), ``.jsonl`` (a record a line) or ``.parquet``.
        max_tokens: At most this many tokens of it, in whole documents, taken in shuffled order until one does not fit.
        text_field: The field or column of .json, .jsonl and .parquet records that holds the text.
    """

    dataset_path: str
    max_tokens: int | None = None
    text_field: str = "text"


@dataclass(frozen=True)
class PackingOptions:
    """The options that decide what the packed arrays hold: two equal ones on equal files give equal bytes.

    The fields are those of `PackedDataModule`, which documents them.

    Raises:
        ConfigurationError: If a value is out of its range; the sentence names the key.
    """

    datasets: list[DatasetConfig]
    sequence_len: int
    max_sequences: int | None
    drop_tails: bool
    mix_datasets: bool
    sequence_prefix: TokenSpec
    document_prefix: TokenSpec
    document_suffix: TokenSpec
    mask_tokens: MaskSpec
    eval_fraction: float
    add_prefix_space: bool
    trust_remote_code: bool
    seed: int

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigurationError("data.datasets is empty: list at least one dataset with its dataset_path.")
        for dataset in self.datasets:
            if dataset.max_tokens is not None and dataset.max_tokens < 1:
                raise ConfigurationError(
                    f"max_tokens of {dataset.dataset_path} is {dataset.max_tokens}: give a positive number."
                )
        if self.sequence_len < 1 or self.sequence_len % 64:
            raise ConfigurationError(
                f"data.sequence_len is {self.sequence_len}: give a positive multiple of 64, the size of a GPU tile."
            )
        if not 0 <= self.eval_fraction < 1:
            raise ConfigurationError(f"data.eval_fraction is {self.eval_fraction}: give a number from 0 to below 1.")
        if self.max_sequences is not None and self.max_sequences < (2 if self.eval_fraction else 1):
            raise ConfigurationError(
                f"data.max_sequences is {self.max_sequences}: training needs a sequence, and so does evaluation unless "
                "eval_fraction is 0; give a larger number."
            )
        if self.seed < 0:
            raise ConfigurationError(f"data.seed is {self.seed}: give 0 or a positive integer.")
