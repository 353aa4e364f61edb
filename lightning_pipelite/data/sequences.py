"""A torch dataset that reads packed sequences from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_pipelite.data.corpus import UNLABELLED
from lightning_pipelite.data.packing import Ints

IGNORED = -100
"""The label that torch's cross-entropy ignores."""


class PackedSequences(Dataset[dict[str, Tensor]]):
    """Memory-mapped sequences as training items.

    Args:
        path: A file written by :func:`~lightning_pipelite.data.sequence_file.write_sequences`.
        isolate_documents: Restart ``position_ids`` at each document and mask labels across document borders.
        masked_ids: Token ids that are never a label.
        padding_id: The token id that fills the empty micro-batch.
        prefix_len: Length of the sequence prefix in tokens; it has no control class.
    """

    def __init__(
        self, path: Path, *, isolate_documents: bool, masked_ids: list[int], padding_id: int, prefix_len: int
    ) -> None:
        self._arguments = (path, isolate_documents, masked_ids, padding_id, prefix_len)
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        self._width: int = file.schema.field("tokens").type.list_size
        self._rows = batches[0].num_rows if batches else 1
        self._length = sum(batch.num_rows for batch in batches)
        self._tokens = [b.column("tokens").values.to_numpy().reshape(-1, self._width) for b in batches]
        self._lengths = [batch.column("length").to_numpy() for batch in batches]
        self._borders = [_lists(batch.column("borders")) for batch in batches]
        self._classes = [_lists(batch.column("classes")) for batch in batches]
        self._isolate = isolate_documents
        self._masked_ids = np.asarray(masked_ids, np.int64)
        self._padding_id = padding_id
        self._prefix_len = prefix_len

    def __len__(self) -> int:
        return self._length

    @override
    def __reduce__(self) -> tuple[Callable[..., Any], Any]:
        return _open, self._arguments  # another process maps the file on its own

    @override
    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """Return one sequence.

        Args:
            index: Its index; None for the empty micro-batch, all of whose labels are -100.

        Returns:
            ``input_ids``, ``labels``, ``position_ids`` and ``control_classes``, int64 of shape [sequence_len].
            ``labels[t]`` is the token to be predicted from position t, that is ``input_ids[t + 1]``, or -100;
            ``control_classes[t]`` the class of that token's document, 1 or -1, or 0 where there is no label.
        """
        width = self._width
        if index is None:
            ids, labels = np.full(width, self._padding_id, np.int64), np.full(width, IGNORED, np.int64)
            return _tensors(ids, labels, np.arange(width), np.zeros(width, np.int64))

        batch, row = divmod(index, self._rows)
        stored = self._tokens[batch][row]
        ids = (stored & ~UNLABELLED).astype(np.int64)
        borders, length = self.borders(index)

        labels = np.full(width, IGNORED, np.int64)
        labels[: length - 1] = ids[1:length]
        labels[:-1][stored[1:] >= UNLABELLED] = IGNORED
        labels[np.isin(labels, self._masked_ids)] = IGNORED
        positions = np.arange(width)
        if self._isolate:
            labels[borders - 1] = IGNORED
            begins = np.concatenate(([0], borders, [length]))
            positions -= np.repeat(begins, np.diff(begins, append=width))
        sizes = np.diff(np.concatenate(([self._prefix_len], borders, [length])))
        classes = np.zeros(width + 1, np.int64)
        classes[self._prefix_len : length] = np.repeat(self.classes(index), sizes)
        classes = np.where(labels == IGNORED, 0, classes[1:])
        return _tensors(ids, labels, positions, classes)

    def without(self, tokens: set[int]) -> set[int]:
        """Return those of ``tokens`` that occur in no sequence."""
        left = tokens
        for block in self._tokens:
            wanted = np.fromiter(left, np.int64, len(left))
            left = {*wanted[~np.isin(wanted, block & ~UNLABELLED)].tolist()}
        return left

    def borders(self, index: int) -> tuple[Ints, int]:
        """Return the columns at which the second and later documents of a sequence begin, and that of its padding."""
        batch, row = divmod(index, self._rows)
        offsets, values = self._borders[batch]
        return values[offsets[row] : offsets[row + 1]].astype(np.int64), int(self._lengths[batch][row])

    def classes(self, index: int) -> Ints:
        """Return the control class of each document in a sequence."""
        batch, row = divmod(index, self._rows)
        offsets, values = self._classes[batch]
        return values[offsets[row] : offsets[row + 1]].astype(np.int64)


def _lists(column: pa.ListArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    return column.offsets.to_numpy(), column.values.to_numpy()


def _open(path: Path, isolate: bool, masked_ids: list[int], padding_id: int, prefix_len: int) -> PackedSequences:
    return PackedSequences(
        path, isolate_documents=isolate, masked_ids=masked_ids, padding_id=padding_id, prefix_len=prefix_len
    )


def _tensors(ids: Ints, labels: Ints, positions: Ints, classes: Ints) -> dict[str, Tensor]:
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "control_classes": torch.from_numpy(classes),
    }
