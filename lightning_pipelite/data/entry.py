"""Reads a cache entry of packed sequences."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from lightning_pipelite.data.build import META
from lightning_pipelite.data.sequences import PackedSequences
from lightning_pipelite.data.statistics import DataStatistics
from lightning_pipelite.errors import ConfigurationError


class CacheEntry:
    """An opened cache entry, as built by `build_entry`.

    Args:
        directory: Directory of the entry.
        isolate_documents: Whether documents are isolated by their positions.

    Attributes:
        statistics: Statistics of what was packed.
        fingerprint: Hash of the training set.
        largest_token: Largest token id in all sets.
        train: The training set.
        evals: The evaluation sets, in the order of the statistics.

    Raises:
        ConfigurationError: If the entry is damaged.
    """

    def __init__(self, directory: Path, isolate_documents: bool) -> None:
        self.directory = directory
        try:
            meta = json.loads((directory / META).read_text())
            self.statistics = DataStatistics.from_dict(meta["statistics"])
            self.fingerprint: str = meta["fingerprint"]
            self.largest_token: int = meta["largest_token"]
            common = {name: meta[name] for name in ("masked_ids", "padding_id", "prefix_len")}
            common["isolate_documents"] = isolate_documents
            self.train = PackedSequences(directory / "train.arrow", **common)
            self.evals = [
                PackedSequences(directory / f"eval-{number}.arrow", **common)
                for number in range(len(self.statistics.evals))
            ]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ConfigurationError(f"The cache entry {directory} is damaged ({error}): delete it.") from error
