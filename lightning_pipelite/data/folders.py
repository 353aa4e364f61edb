"""Which files in a folder are data."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_pipelite.data.formats import FORMATS, TEXT, format_of
from lightning_pipelite.data.splits import split_of
from lightning_pipelite.errors import ConfigurationError

# Files that accompany data: documentation, and those that Hugging Face's libraries write, including their cache files.
_ABOUT = re.compile(
    r"(readme|licen[sc]e|copying|changelog|contributing|citation|notice|authors|requirements|data(set)?[\W_]?card|"
    r"data[\W_]?sheet)(?![a-z]).*\.(md|txt)",
    re.IGNORECASE,
)
_OF_LIBRARIES = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-[0-9a-f]{16}\b.*\.arrow")


def data_of(path: Path) -> list[Path]:
    """Return the data files in a directory, or in its `data` folder, or in its folders if they are all splits.

    Other files there (a README, a cache) are not taken as data, but those that a glob names are.

    Raises:
        ConfigurationError: If there are data files both in the directory and in a split's folder.
    """
    folders = _folders(path)
    splits = [folder for folder in folders if split_of(Path(folder.name)) is not None]
    for folder in (path, path / "data"):
        if folder.is_dir() and (files := _data_in(folder)):
            inner = _folders(folder)
            beside = [
                *splits,
                *(each for each in inner if each not in splits and split_of(Path(each.name)) is not None),
            ]
            if beside:
                raise ConfigurationError(
                    f"{path} has data in {min(files).relative_to(path)} and in the folder of a split, "
                    f"{beside[0].relative_to(path)}: set dataset_path to the one to use."
                )
            return files
    if len(splits) == len(folders):
        return [file for folder in folders for file in _data_in(folder)]
    return []


def tells_of_data(file: Path) -> bool:
    """Return whether a file, by its name, accompanies data instead of being data, such as a README."""
    return _ABOUT.fullmatch(file.name) is not None or _OF_LIBRARIES.fullmatch(file.name) is not None


def nothing_in(dataset_path: str, path: Path) -> str:
    """Return the error message for a path where no data was found."""
    if path.is_dir():
        folders = [each.name for each in _folders(path)]
        if folders:
            return (
                f"{dataset_path} has data only in its subfolders {', '.join(folders[:12])}: set dataset_path "
                f"to one of them, such as {path / folders[0]}."
            )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", dataset_path) and not Path(dataset_path).parent.exists():
        return (
            f"there is no file or directory {dataset_path}; if it is a Hugging Face dataset, download it first (hf "
            f"download {dataset_path} --repo-type dataset --local-dir {path.name}), and set dataset_path to "
            f"{path.name}."
        )
    return (
        f"dataset_path {dataset_path} matches no file: set it to a file, a directory or a glob of {', '.join(FORMATS)}."
    )


def not_read(dataset_path: str, files: list[Path]) -> list[str]:
    """Return the names of files in a directory that are not among these, except hidden ones.

    Args:
        dataset_path: As in `DatasetConfig`.
        files: The files to be read, as found in it.
    """
    path = Path(dataset_path).expanduser()
    there = {file.absolute() for folder in _looked_at(path, files) for file in folder.iterdir() if file.is_file()}
    missing = (file for file in there - {*files} if not file.name.startswith("."))
    return sorted(str(file.relative_to(path.absolute())) for file in missing)


def folders_not_read(dataset_path: str, files: list[Path]) -> list[str]:
    """Return the names of folders in a directory that hold data but are not read; arguments as in `not_read`."""
    path = Path(dataset_path).expanduser()
    looked_at = {folder.absolute() for folder in _looked_at(path, files)}
    return [folder.name for folder in _folders(path) if folder.absolute() not in looked_at] if looked_at else []


def _looked_at(path: Path, files: list[Path]) -> set[Path]:
    """Return the folders of a dataset whose files are read or reported; none for one that `datasets` has saved."""
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return set()
    return {path, *(file.parent for file in files), *([path / "data"] if (path / "data").is_dir() else [])}


def _folders(path: Path) -> list[Path]:
    """Return the folders with data, except those that programs create, such as .ipynb_checkpoints and __MACOSX."""
    folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith((".", "__")))
    return [each for each in folders if _data_in(each)]


def _data_in(folder: Path) -> list[Path]:
    files = [
        file
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and format_of(file) is not None and not tells_of_data(file)
    ]
    if any(format_of(file) not in TEXT for file in files):  # .md files next to records are documentation
        files = [file for file in files if format_of(file) != ".md"]
    return files
