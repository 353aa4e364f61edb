"""Log directories of runs that ended before they logged anything."""

from __future__ import annotations

import contextlib
from fnmatch import fnmatch
from pathlib import Path

import lightning.pytorch as pl

_OF_EVERY_RUN = ("events.out.tfevents.*", "hparams.yaml", "config*.yaml", "metrics.csv")


class EmptyLogs:
    """Removes the log directories that a run has created, if it ended before anything was logged.

    Lightning creates them before the strategy is set up, so every refused run, and every resumption of a completed
    training, would leave a ``version_N`` behind.

    Args:
        trainer: The Trainer, before it has created them.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self._made: dict[Path, list[Path]] = {}  # each with its missing parents, innermost first
        for logger in trainer.loggers:
            directory = getattr(logger, "log_dir", None)
            if not isinstance(directory, str) or "://" in directory:
                continue
            path = Path(directory).absolute()
            if not path.exists():
                self._made[path] = [parent for parent in path.parents if not parent.exists()]

    def remove(self) -> None:
        """Remove those that hold only what every run writes at its start."""
        for directory, parents in self._made.items():
            with contextlib.suppress(OSError):
                files = list(directory.iterdir())
                if any(path.is_dir() or not any(fnmatch(path.name, p) for p in _OF_EVERY_RUN) for path in files):
                    continue
                for path in files:
                    path.unlink()
                for empty in (directory, *parents):
                    empty.rmdir()
        self._made = {}
