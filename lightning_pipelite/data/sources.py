"""Finds the files of a dataset."""

from __future__ import annotations

import glob
import json
from pathlib import Path

from lightning_pipelite.data.folders import data_of, not_read, nothing_in
from lightning_pipelite.data.formats import COMPRESSIONS, FORMATS, format_of
from lightning_pipelite.data.splits import choose_split, of_one_split
from lightning_pipelite.errors import ConfigurationError

__all__ = ["find_files", "not_read"]


def find_files(dataset_path: str, split: str | None = None, *, evaluation: bool = False) -> list[Path]:
    """Resolve a file, directory or glob to its files.

    Args:
        dataset_path: As in `DatasetConfig`; ``~`` stands for the home directory.
        split: The split to read if a directory has several; None chooses one if that is unambiguous.
        evaluation: Whether the files are for evaluation, so that the training split is not meant.

    Returns:
        Absolute paths without duplicates, sorted by name; for a saved Hugging Face dataset, in the order of its
        records.

    Raises:
        ConfigurationError: If nothing is found, it is ambiguous which split is meant, or a file has an unknown format.
    """
    path = Path(dataset_path).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_dataset(path, split, evaluation)
    named, root = False, path if path.is_dir() else path.parent
    if path.is_dir():
        files = data_of(path)
    elif path.is_file():
        files = [path]
        if split is not None:
            raise ConfigurationError(f"{dataset_path} is a file and has no splits: leave split out.")
    else:
        named, root = True, _fixed_part(path)
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        raise ConfigurationError(nothing_in(dataset_path, path))
    for file in files:
        if not format_of(file):
            raise ConfigurationError(
                f"{file} is not in a supported format: convert it to one of {', '.join(FORMATS)} (all but the last "
                f"two may be compressed: {', '.join(COMPRESSIONS)})."
            )
    files = sorted({file.absolute() for file in files})
    return of_one_split(files, split, dataset_path, root=root.absolute(), evaluation=evaluation, named=named)


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that contains all matches of a glob."""
    return next((each for each in reversed(pattern.parents) if glob.has_magic(each.name)), pattern).parent


def _saved_dataset(path: Path, split: str | None, evaluation: bool) -> list[Path]:
    """Return the Arrow files of a dataset that `datasets` has written with save_to_disk."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if split is not None and split not in splits:
                raise ConfigurationError(
                    f"split of {path} is {split}, which does not exist (it has {', '.join(splits)}); correct it."
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
        raise ConfigurationError(
            f"{path} is not a readable Hugging Face dataset ({error!r}): save it again."
        ) from error
    if reordered:
        raise ConfigurationError(
            f"{path} selects its records by an indices file: call flatten_indices() and save it again."
        )
    if not files:
        raise ConfigurationError(f"dataset_path {path} matches no file: the Hugging Face dataset is empty.")
    return files
