"""Which files a dataset is made of, and their bytes."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import re
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from lightning_pipelite.data.splits import choose_split, of_one_split, split_of
from lightning_pipelite.errors import ConfigurationError

TEXT = (".txt", ".md")
READ_WHOLE = (*TEXT, ".json")
"""What is in memory as a whole before its first record is there."""
COLUMNS = (".csv", ".tsv", ".parquet", ".arrow")
FORMATS = (*TEXT, ".json", ".jsonl", *COLUMNS)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# What lies beside data and tells of it. The second are of Hugging Face's libraries.
_ABOUT = re.compile(r"(readme|licen[sc]e|changelog|contributing|citation|notice)\b.*\.(md|txt)", re.IGNORECASE)
_OF_LIBRARIES = ("dataset_infos.json", "dataset_info.json", "state.json")


def format_of(path: Path) -> str | None:
    """Give the ending that says how to read a file, without that of its compression; None for an unknown one."""
    if path.suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix
        return inner if inner in FORMATS[:-2] else None  # parquet and arrow compress inside
    return path.suffix if path.suffix in FORMATS else None


def find_files(dataset_path: str, split: str | None = None, *, evaluation: bool = False) -> list[Path]:
    """Resolve a file, directory or glob to its files.

    Args:
        dataset_path: As in `DatasetConfig`; ``~`` stands for the home directory.
        split: Of several in a directory, the one to read; None chooses if there is no doubt.
        evaluation: Whether they are to evaluate on, so that train is not what is meant.

    Returns:
        Absolute paths, each once: in order of name, for a Hugging Face dataset in that of its records.

    Raises:
        ConfigurationError: If nothing is found, or a file named by it has none of the formats.
    """
    path = Path(dataset_path).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_dataset(path, split, evaluation)
    named, root = False, path if path.is_dir() else path.parent
    if path.is_dir():
        files = _of_directory(path)
    elif path.is_file():
        files = [path]
        if split is not None:
            raise ConfigurationError(f"{dataset_path} is a file and has no splits: leave split out.")
    else:
        named, root = True, _fixed_part(path)
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        raise ConfigurationError(_nothing(dataset_path, path))
    for file in files:
        if not format_of(file):
            raise ConfigurationError(
                f"{file} has no known format: convert it to one of {', '.join(FORMATS)} (all but the last two may be "
                f"compressed: {', '.join(COMPRESSIONS)})."
            )
    files = sorted({file.absolute() for file in files})
    return of_one_split(files, split, dataset_path, root=root.absolute(), evaluation=evaluation, named=named)


def _fixed_part(pattern: Path) -> Path:
    """Give the folder that all matches of a glob are in."""
    return next((each for each in reversed(pattern.parents) if glob.has_magic(each.name)), pattern).parent


def _nothing(dataset_path: str, path: Path) -> str:
    if path.is_dir():
        folders = [each.name for each in sorted(path.iterdir()) if each.is_dir() and _data_in(each)]
        if folders:
            return (
                f"{dataset_path} has no data in it but in its folders {', '.join(folders[:12])}: name one of them, "
                f"such as {path / folders[0]}."
            )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", dataset_path) and not Path(dataset_path).parent.exists():
        return (
            f"there is no file or directory {dataset_path}; if it is a dataset of Hugging Face, download it first: "
            f"hf download {dataset_path} --repo-type dataset --local-dir {path.name}, and name {path.name}."
        )
    return f"dataset_path {dataset_path} matches no file: name a file, a directory or a glob of {', '.join(FORMATS)}."


def _of_directory(path: Path) -> list[Path]:
    """Return the data in a directory, or in its `data`, or in its folders if they are splits.

    What else lies there (a README, a cache) is not meant as data; what a glob names is.
    """
    folders = [each for each in sorted(path.iterdir()) if each.is_dir() and _data_in(each)]
    splits = [folder for folder in folders if split_of(Path(folder.name)) is not None]
    for folder in (path, path / "data"):
        if folder.is_dir() and (files := _data_in(folder)):
            inner = [each for each in sorted(folder.iterdir()) if each.is_dir() and _data_in(each)]
            beside = [
                *splits,
                *(each for each in inner if each not in splits and split_of(Path(each.name)) is not None),
            ]
            if beside:
                raise ConfigurationError(
                    f"{path} has data in {min(files).relative_to(path)} and in the folder of a split, "
                    f"{beside[0].relative_to(path)}: name the one that is meant by dataset_path."
                )
            return files
    if len(splits) == len(folders):
        return [file for folder in folders for file in _data_in(folder)]
    return []


def _data_in(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".") and _is_data(file)]
    if any(format_of(file) not in TEXT for file in files):  # .md beside records tells of them
        files = [file for file in files if format_of(file) != ".md"]
    return files


def _is_data(file: Path) -> bool:
    return format_of(file) is not None and not _ABOUT.fullmatch(file.name) and file.name not in _OF_LIBRARIES


def not_read(dataset_path: str, files: list[Path]) -> list[str]:
    """Give the names of files in a directory that are not among these; hidden ones are not meant at all.

    Args:
        dataset_path: As in `DatasetConfig`.
        files: What `find_files` has found in it.
    """
    path = Path(dataset_path).expanduser()
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return []
    folders = {path, *(file.parent for file in files), *([path / "data"] if (path / "data").is_dir() else [])}
    there = {file.absolute() for folder in folders for file in folder.iterdir() if file.is_file()}
    missing = (file for file in there - {*files} if not file.name.startswith("."))
    return sorted(str(file.relative_to(path.absolute())) for file in missing)


def _saved_dataset(path: Path, split: str | None, evaluation: bool) -> list[Path]:
    """Return the Arrow files of what `datasets` writes by save_to_disk."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if split is not None and split not in splits:
                raise ConfigurationError(
                    f"split of {path} is {split}, which is not there (it has {', '.join(splits)}); correct it."
                )
            chosen = split or choose_split(splits, str(path), evaluation=evaluation)
            return _saved_dataset(path / chosen, None, evaluation)
        if split is not None:
            raise ConfigurationError(f"{path} is one split of a dataset: leave split out.")
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
