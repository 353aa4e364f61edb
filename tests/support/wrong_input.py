"""One wrong input, and how to create it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STRATEGY = "lightning_pipelite.PipeLiteStrategy"
Prepare = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Case:
    """A wrong input.

    Args:
        says: The error message, in which ``{job}`` and ``{here}`` stand for directories. If it does not end like a
            sentence, it is only the beginning, and the rest, a library's text, may be anything.
        arguments: Arguments of the command, after ``fit --config config.yaml`` unless ``command`` says otherwise.
        edit: Dotted keys and their values in the configuration; None removes the key.
        prepare: Creates whatever else has to be wrong, given the working directory and the job.
        command: The words before the arguments.
        environment: Additional environment variables.
        starts: Whether it can only be detected while training is set up, for which DeepSpeed starts compilers.
    """

    says: str
    arguments: list[str] = field(default_factory=list)
    edit: dict[str, Any] = field(default_factory=dict)
    prepare: Prepare = lambda here, job: None
    command: list[str] = field(default_factory=lambda: ["fit", "--config", "config.yaml"])
    environment: dict[str, str] = field(default_factory=dict)
    starts: bool = False


def file(name: str, content: str | bytes) -> Prepare:
    """Write a file into the working directory."""

    def write(here: Path, job: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def copied(name: str, damage: Callable[[Path], Any]) -> Prepare:
    """Copy a directory of the job to ``copy`` in the working directory, and damage it."""

    def copy(here: Path, job: Path) -> None:
        shutil.copytree(job / name, here / "copy")
        damage(here / "copy")

    return copy


def replaced(name: str, before: str, after: str) -> Callable[[Path], None]:
    """Replace a text in a file."""

    def replace(directory: Path) -> None:
        text = (directory / name).read_text(encoding="utf-8")
        assert before in text
        (directory / name).write_text(text.replace(before, after), encoding="utf-8")

    return replace


def written(name: str, content: str) -> Callable[[Path], Any]:
    """Write a file."""
    return lambda directory: (directory / name).write_text(content, encoding="utf-8")


def removed(pattern: str) -> Callable[[Path], None]:
    """Remove files."""

    def remove(directory: Path) -> None:
        paths = list(directory.glob(pattern))
        assert paths
        for path in paths:
            path.unlink()

    return remove


def truncated(name: str) -> Callable[[Path], None]:
    """Take the last hundred bytes off a file."""

    def truncate(directory: Path) -> None:
        (path,) = directory.glob(name)
        path.write_bytes(path.read_bytes()[:-100])

    return truncate


def strategy(**init_args: Any) -> dict[str, Any]:
    """Return the edit for a strategy with options."""
    return {"trainer.strategy": {"class_path": STRATEGY, "init_args": init_args}}


def adapter(name: str, **init_args: Any) -> dict[str, Any]:
    """Return the edit for an adapter with options."""
    return {"model.adapter": {"class_path": f"lightning_pipelite.adapters.{name}", "init_args": init_args}}


def callback(name: str, **init_args: Any) -> dict[str, Any]:
    """Return the edit for one callback with options."""
    return {"trainer.callbacks": [{"class_path": f"lightning_pipelite.callbacks.{name}", "init_args": init_args}]}


def dataset(path: str, **options: Any) -> dict[str, Any]:
    """Return the edit for one dataset with options."""
    return {"data.datasets": [{"dataset_path": path, **options}]}


def edited(config: dict[str, Any], edit: dict[str, Any]) -> dict[str, Any]:
    """Change a configuration by dotted keys."""
    for key, value in edit.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return config
