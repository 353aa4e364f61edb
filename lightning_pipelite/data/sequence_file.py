"""Writes packed sequences to disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_pipelite.data.corpus import UNLABELLED
from lightning_pipelite.data.packing import Ints, Layout
from lightning_pipelite.shared.progress import track

_BATCH_TOKENS = 1 << 18


def write_sequences(
    path: Path,
    layout: Layout,
    scratch: Path,
    offsets: Ints,
    classes: npt.NDArray[np.int8],
    *,
    sequence_len: int,
    prefix: list[int],
    padding_id: int,
) -> str:
    """Write the sequences of a layout to an Arrow file, in batches of about 1 MiB of tokens.

    Each row is a sequence: ``tokens`` uint32 [sequence_len], ids with the flag `UNLABELLED`; ``length`` int32, where
    padding begins; ``borders`` list of int32, the columns at which another document begins; ``classes`` list of int8,
    the control class of each document in it.

    Args:
        path: The file to write.
        layout: The layout of the documents; its capacity is ``sequence_len - len(prefix)``.
        scratch: A file with the concatenated tokens of all documents, uint32.
        offsets: Shape [documents], the index in it at which each document begins, in tokens.
        classes: Shape [documents], the control class of each document.
        sequence_len: Tokens per sequence.
        prefix: Token ids at the start of every sequence.
        padding_id: Token id that fills a sequence after its last document.

    Returns:
        A hash of everything that was written.
    """
    capacity = sequence_len - len(prefix)
    begins = offsets[layout.documents] + layout.sources
    sequence = layout.starts // capacity
    rows = max(1, _BATCH_TOKENS // sequence_len)
    empty = np.full(sequence_len, padding_id, np.uint32)
    empty[: len(prefix)] = prefix
    tokens_type, list_type = pa.list_(pa.uint32(), sequence_len), pa.list_(pa.int32())
    schema = pa.schema(
        {"tokens": tokens_type, "length": pa.int32(), "borders": list_type, "classes": pa.list_(pa.int8())}
    )
    fingerprint = hashlib.blake2b(digest_size=16)
    # Ordinary reads and writes, no memory map: on a full disk they raise an error where a map would raise SIGBUS, and
    # mapped pages count as the process's memory.
    with scratch.open("rb") as source, path.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for first in track(range(0, layout.sequences, rows), "packing", "blocks"):
            count = min(rows, layout.sequences - first)
            low, high = np.searchsorted(sequence, (first, first + count)).tolist()
            block = np.tile(empty, (count, 1))
            row = sequence[low:high] - first
            column = len(prefix) + layout.starts[low:high] - sequence[low:high] * capacity
            size = layout.sizes[low:high]
            for r, c, n, b in zip(row.tolist(), column.tolist(), size.tolist(), begins[low:high].tolist(), strict=True):
                block[r, c : c + n] = np.frombuffer(os.pread(source.fileno(), 4 * n, 4 * b), np.uint32)
            lengths = np.zeros(count, np.int32)
            lengths[row] = column + size  # for several segments in a row, the last one is kept
            segments = np.searchsorted(row, np.arange(count + 1)).astype(np.int32)
            inner = column > len(prefix)
            borders = np.concatenate(([0], np.cumsum(inner)))[segments].astype(np.int32)
            held = classes[layout.documents[low:high]]
            for array in (block, lengths, segments, column, held):
                fingerprint.update(array.tobytes())
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), sequence_len),
                pa.array(lengths),
                pa.ListArray.from_arrays(pa.array(borders), pa.array(column[inner].astype(np.int32))),
                pa.ListArray.from_arrays(pa.array(segments), pa.array(held)),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return fingerprint.hexdigest()


def largest_token(path: Path) -> int:
    """Return the largest token id in a file of `write_sequences`, including prefixes and padding; -1 if it is empty."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    columns = (file.get_batch(number).column("tokens") for number in range(file.num_record_batches))
    return max((int((column.values.to_numpy() & ~UNLABELLED).max(initial=0)) for column in columns), default=-1)
