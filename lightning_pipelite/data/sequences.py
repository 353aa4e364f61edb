"""Packed sequences on disk: how they are written, and the torch dataset that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_pipelite.data.packing import Ints, Layout

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""


def write_sequences(
    folder: Path,
    layout: Layout,
    tokens: npt.NDArray[np.uint32],
    offsets: Ints,
    *,
    sequence_len: int,
    prefix: list[int],
    padding_id: int,
) -> None:
    """Write the sequences of a layout, one after the other, with memory for one.

    Four arrays: ``tokens`` uint32 [sequences, sequence_len]; ``lengths`` int32 [sequences], where padding begins;
    ``borders`` int32, the columns at which a document begins after another one in the same sequence;
    ``border_offsets`` int64 [sequences + 1], which of them belong to which sequence.

    Args:
        folder: A directory that exists.
        layout: Where documents lie; its capacity is ``sequence_len - len(prefix)``.
        tokens: The tokens of all documents, one after the other.
        offsets: Shape [documents], where each begins in `tokens`.
        sequence_len: Tokens of a sequence.
        prefix: Token ids that begin every sequence.
        padding_id: Token id behind the last document.
    """
    capacity = sequence_len - len(prefix)
    lengths = np.zeros(layout.sequences, np.int32)
    borders: list[int] = []
    border_offsets = np.zeros(layout.sequences + 1, np.int64)
    empty = np.full(sequence_len, padding_id, np.uint32)
    empty[: len(prefix)] = prefix

    # Written by ordinary writes, not through a memory map: on a full disk that is an error, not a SIGBUS.
    with (folder / "tokens.npy").open("wb") as file:
        _write_header(file, (layout.sequences, sequence_len))
        row, current = empty.copy(), 0
        for document, start, kept in zip(
            layout.documents.tolist(), layout.starts.tolist(), layout.kept.tolist(), strict=True
        ):
            source, done = int(offsets[document]), 0
            while done < kept:
                sequence, slot = divmod(start + done, capacity)
                if sequence != current:
                    file.write(row.tobytes())
                    row, current = empty.copy(), sequence
                column, taken = len(prefix) + slot, min(kept - done, capacity - slot)
                row[column : column + taken] = tokens[source + done : source + done + taken]
                if slot > 0:
                    borders.append(column)
                    border_offsets[sequence + 1] += 1
                lengths[sequence] = column + taken
                done += taken
        if layout.sequences:
            file.write(row.tobytes())
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "borders.npy", np.asarray(borders, np.int32))
    np.save(folder / "border_offsets.npy", np.cumsum(border_offsets))


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    description = np.lib.format.dtype_to_descr(np.dtype(np.uint32))
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": shape})


class PackedSequences(Dataset[dict[str, Tensor]]):
    """Memory-mapped sequences as training items.

    Args:
        folder: What `write_sequences` wrote.
        isolate_documents: Restart ``position_ids`` at each document and mask the label across a border.
        masked_ids: Token ids that are never a label.
        padding_id: The token id of the empty item.
    """

    def __init__(self, folder: Path, *, isolate_documents: bool, masked_ids: list[int], padding_id: int) -> None:
        self._tokens = _open(folder / "tokens.npy")
        self._lengths = _open(folder / "lengths.npy")
        self._borders = _open(folder / "borders.npy")
        self._border_offsets = _open(folder / "border_offsets.npy")
        self._isolate = isolate_documents
        self._masked_ids = np.asarray(masked_ids, np.int64)
        self._padding_id = padding_id

    def __len__(self) -> int:
        return len(self._tokens)

    @override
    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """Give one sequence.

        Args:
            index: Which one; None for the empty micro-batch, which no label counts in.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, int64 of shape [sequence_len]. ``labels[t]`` is the token to
            be predicted from position t, that is ``input_ids[t + 1]``, or -100.
        """
        width = self._tokens.shape[1]
        positions = np.arange(width)
        labels = np.full(width, IGNORED, np.int64)
        if index is None:
            return _tensors(np.full(width, self._padding_id, np.int64), labels, positions)

        tokens = self._tokens[index].astype(np.int64)
        length = int(self._lengths[index])
        labels[: length - 1] = tokens[1:length]
        labels[np.isin(labels, self._masked_ids)] = IGNORED
        if self._isolate:
            borders = self._borders[self._border_offsets[index] : self._border_offsets[index + 1]]
            labels[borders - 1] = IGNORED
            begins = np.concatenate(([0], borders, [length] if length < width else [])).astype(np.int64)
            positions -= np.repeat(begins, np.diff(begins, append=width))
        return _tensors(tokens, labels, positions)


def _open(path: Path) -> npt.NDArray[np.generic]:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _tensors(tokens: Ints, labels: Ints, positions: Ints) -> dict[str, Tensor]:
    return {
        "input_ids": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }
