"""Supported file formats and compressions, by file extension."""

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
"""Formats that are read into memory as a whole before their first record is available."""
COLUMNS = (".csv", ".tsv", ".parquet", ".arrow")
FORMATS = (*TEXT, ".json", ".jsonl", *COLUMNS)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def format_of(path: Path) -> str | None:
    """Return the extension that determines a file's format, ignoring that of its compression; None if unknown."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix.lower()
        return inner if inner in FORMATS[:-2] else None  # parquet and arrow compress internally
    return suffix if suffix in FORMATS else None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressing it according to its extension."""
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
