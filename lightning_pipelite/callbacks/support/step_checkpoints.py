"""Checkpoints named after their step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"step=(\d{8,})\.ckpt")


class StepCheckpoints:
    """The checkpoints in a directory that are called ``step=NUMBER.ckpt``.

    Args:
        directory: The directory; it need not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __iter__(self) -> Iterator[Path]:
        if self.directory.is_dir():
            yield from (path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))

    def of_step(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.directory / f"step={step:08d}.ckpt"

    def from_newest(self, newest: Path) -> list[Path]:
        """Return all of them, the newest first.

        Args:
            newest: The one that was written last. Those of later steps are left over from a training that was resumed
                from an earlier step, and count as the oldest.
        """
        last = step_of(newest)
        steps = {path: step_of(path) or 0 for path in self}
        return sorted(steps, key=lambda path: (last is not None and steps[path] <= last, steps[path]), reverse=True)


def step_of(path: str | Path) -> int | None:
    """Return the step in a checkpoint's name; None for a name of another form."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None
