"""Output files and directories that appear complete or not at all, and never replace anything."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lightning_pipelite.adapters.directory import refuse_other_content, whole_directory
from lightning_pipelite.errors import ConfigurationError


def check_new_directory(output: Path, inputs: Sequence[Path]) -> None:
    """Check up front that ``output`` can be written without replacing anything.

    Args:
        output: Directory to write; must be empty or not exist.
        inputs: Directories that are read; none of them may equal, contain or lie in ``output``.

    Raises:
        ConfigurationError: ``output`` holds something or overlaps an input.
    """
    for each in inputs:
        one, other = output.resolve(), each.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise ConfigurationError(f"output {output} and input {each} overlap; choose another place for the output.")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigurationError(f"{output} is not empty; choose a new directory for the output.")
    refuse_other_content(Path(os.path.abspath(output)), ())  # noqa: PTH100  (resolve() would follow a link)


def new_directory(output: Path, inputs: Sequence[Path]) -> AbstractContextManager[Path]:
    """Return a context manager with a directory to write in, which becomes ``output`` once it is complete and on disk.

    Args:
        output: Directory to write; must be empty or not exist.
        inputs: Directories that are read; none of them may equal, contain or lie in ``output``.

    Raises:
        ConfigurationError: ``output`` holds something or overlaps an input.
    """
    check_new_directory(output, inputs)
    return whole_directory(output, ())


def check_new_file(output: Path) -> None:
    """Check up front that ``output`` can be written without replacing anything.

    Raises:
        ConfigurationError: ``output`` exists.
    """
    if output.exists() or output.is_symlink():
        raise ConfigurationError(f"{output} exists; choose a new file for the output.")


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which becomes ``output`` once it is complete and on disk.

    Raises:
        ConfigurationError: ``output`` exists.
    """
    check_new_file(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        check_new_file(output)
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
