"""Sets of packed sequences and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_pipelite.data.config import PackingOptions
from lightning_pipelite.data.corpus import Corpus
from lightning_pipelite.data.folders import not_read
from lightning_pipelite.data.packing import Ints, Layout
from lightning_pipelite.data.statistics import DatasetStatistics, DataStatistics, SplitStatistics


@dataclass
class PackedSet:
    """The training set or an evaluation set: its documents, in groups that share no sequence, and their layout."""

    name: str
    groups: list[Ints]
    layout: Layout


class PackingStatistics:
    """Computes statistics of what was packed.

    Args:
        options: The options used for packing.
        files: The files of each dataset in ``options.sources``.
        corpus: Their documents.
        capacity: Positions in a sequence after its prefix.
    """

    def __init__(self, options: PackingOptions, files: list[list[Path]], corpus: Corpus, capacity: int) -> None:
        self._options, self._files, self._corpus, self._capacity = options, files, corpus, capacity

    def of(self, sets: Sequence[PackedSet]) -> DataStatistics:
        """Return the statistics of all sets and datasets; the training set is the first of ``sets``."""
        train, *evals = map(self._of_set, sets)
        names = [each.name for each in sets[1:]]
        datasets = [self._of_dataset(number, sets) for number in range(len(self._corpus.ends))]
        return DataStatistics(train, dict(zip(names, evals, strict=True)), datasets)

    def _of_set(self, packed: PackedSet) -> SplitStatistics:
        layout = packed.layout
        tokens = int(layout.sizes.sum())
        return SplitStatistics(
            documents=len(np.unique(layout.documents)),
            tokens=tokens,
            sequences=layout.sequences,
            padding=self._padding(layout.sequences, tokens),
            dropped_tokens=int(self._corpus.lengths[np.concatenate(packed.groups)].sum()) - tokens,
        )

    def _of_dataset(self, number: int, sets: Sequence[PackedSet]) -> DatasetStatistics:
        documents, left_out = self._corpus.documents(number), self._corpus.left_out[number]
        path = self._options.sources[number].dataset_path
        begin, end = (int(documents[0]), int(documents[-1]) + 1)
        packed = tokens = sequences = filled = 0
        for layout in (each.layout for each in sets):
            ours = (layout.documents >= begin) & (layout.documents < end)
            rows = layout.starts // self._capacity
            touched = np.unique(rows[ours])
            packed += len(np.unique(layout.documents[ours]))
            tokens += int(layout.sizes[ours].sum())
            sequences += len(touched)
            filled += int(layout.sizes[np.isin(rows, touched)].sum())
        return DatasetStatistics(
            dataset_path=path,
            documents=packed,
            tokens=tokens,
            sequences=sequences,
            padding=self._padding(sequences, filled),
            unused_documents=len(documents) - packed,
            skipped=left_out.count,
            first_skipped=left_out.first,
            broken_files=left_out.files,
            ignored_keys=sorted(left_out.keys),
            ignored_files=not_read(path, self._files[number]),
            long=str(left_out.long),
        )

    def _padding(self, sequences: int, tokens: int) -> float:
        positions = sequences * self._options.sequence_len
        return (sequences * self._capacity - tokens) / positions if sequences else 0.0
