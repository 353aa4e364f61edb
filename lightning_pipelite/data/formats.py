"""The formats of files that can be read, by their names, and their bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

TEXT = (".txt", ".md")
READ_WHOLE = (*TEXT, ".json")
"""What is in memory as a whole before its first record is there."""
COLUMNS = (".csv", ".tsv", ".parquet", ".arrow")
FORMATS = (*TEXT, ".json", ".jsonl", *COLUMNS)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def format_of(path: Path) -> str | None:
    """Give the ending that says how to read a file, without that of its compression; None for an unknown one."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix.lower()
        return inner if inner in FORMATS[:-2] else None  # parquet and arrow compress inside
    return suffix if suffix in FORMATS else None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed by what its name ends in."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")
