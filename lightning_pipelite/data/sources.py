"""Which files a dataset is made of, and their bytes."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from lightning_pipelite.errors import ConfigurationError

FORMATS = (".txt", ".json", ".jsonl", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def format_of(path: Path) -> str | None:
    """Give the ending that says how to read a file, without that of its compression; None for an unknown one."""
    if path.suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix
        return inner if inner in (".txt", ".json", ".jsonl") else None  # parquet and arrow compress inside
    return path.suffix if path.suffix in FORMATS else None


def find_files(dataset_path: str) -> list[Path]:
    """Resolve a file, directory or glob to its files.

    Args:
        dataset_path: As in `DatasetConfig`; ``~`` stands for the home directory.

    Returns:
        Absolute paths, each once: in order of name, for a Hugging Face dataset in that of its records.

    Raises:
        ConfigurationError: If nothing is found, or a file named by it has none of the formats.
    """
    path = Path(dataset_path).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_dataset(path)
    if path.is_dir():
        # What else lies in a directory (a README, a cache) is not meant as data; what a glob names is.
        files = [file for file in path.iterdir() if file.is_file() and format_of(file)]
    elif path.is_file():
        files = [path]
    else:
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        raise ConfigurationError(
            f"dataset_path {dataset_path} matches no file: name a file, a directory or a glob of {', '.join(FORMATS)}."
        )
    for file in files:
        if not format_of(file):
            raise ConfigurationError(
                f"{file} has no known format: convert it to one of {', '.join(FORMATS)} (text formats may be "
                f"compressed: {', '.join(COMPRESSIONS)})."
            )
    return sorted({file.absolute() for file in files})


def not_read(dataset_path: str) -> list[str]:
    """Give the names of files in a directory that `find_files` takes for no data; hidden ones are not meant at all."""
    path = Path(dataset_path).expanduser()
    if not path.is_dir() or (path / "state.json").is_file():
        return []
    files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(file.name for file in files if not format_of(file))


def _saved_dataset(path: Path) -> list[Path]:
    """The Arrow files of what `datasets` writes by save_to_disk."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            raise ConfigurationError(
                f"{path} holds the splits {', '.join(splits)}: name one, such as {path / splits[0]}."
            )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path.absolute() / entry["filename"] for entry in state["_data_files"]]
        reordered = bool(state.get("_indices_files"))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{path} is no readable Hugging Face dataset ({error!r}): save it anew.") from error
    if reordered:
        raise ConfigurationError(f"{path} selects records by an indices file: call flatten_indices() and save it anew.")
    if not files:
        raise ConfigurationError(f"dataset_path {path} matches no file: the Hugging Face dataset is empty.")
    return files


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed by what its name ends in."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")
