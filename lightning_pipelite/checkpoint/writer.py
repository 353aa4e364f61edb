"""Writes checkpoints in the background, all ranks together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_pipelite.checkpoint.directory import PartialDirectory, remove_directory
from lightning_pipelite.checkpoint.manifest import write_manifest
from lightning_pipelite.checkpoint.written_file import Written

Files = Mapping[str, Callable[[Path], Written]]
"""The files that a rank writes: for each name, a function that writes the file to a path."""


class CheckpointWriter:
    """One thread per rank, one checkpoint at a time; rank 0 creates the directory and publishes it once all are done.

    The ranks communicate over a process group used for nothing else. Construction is collective.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout: How long a rank may take to write its files.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta) -> None:
        self._rank = rank
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._busy, self._path = False, Path()
        self.failure: str | None = None  # of the last write
        self.closed = False
        self._doomed: list[Path] = []

    def start(self, path: Path, files: Files) -> None:
        """Write a checkpoint in the background, once the previous one is done. Called on every rank.

        A failure is reported as a warning: training continues, and earlier checkpoints stay.
        """
        self.wait()
        with self._lock:
            self._busy, self._path = True, path
            self._doomed = [doomed for doomed in self._doomed if doomed != path]
        self._thread = threading.Thread(target=self._write, args=(path, files), name="pipelite-checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is being written, or for at most ``seconds``."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def close(self) -> None:
        """Wait; afterwards the ranks use the default process group, as the writer's own is about to be destroyed."""
        self.wait()
        self.closed = True
        if self._group is not None:
            self._group = dist.group.WORLD

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, but not before a newer one is safely on disk. Called on rank 0."""
        with self._lock:
            self._doomed.append(path)
            if not self._busy and self.failure is None:
                self._remove_doomed()

    def promised(self, path: Path) -> bool | None:
        """Return whether a checkpoint will exist once pending work is done; None if nothing is pending for it."""
        with self._lock:
            if path in self._doomed:
                return False
            return True if self._busy and path == self._path else None

    def share(self, mine: Any) -> list[Any]:
        """Gather ``mine`` from every rank; not to be called while something is being written. Collective."""
        shared: list[Any] = [mine]
        if self._group is not None:
            shared = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(shared, mine, group=self._group)
        return shared

    def _write(self, path: Path, files: Files) -> None:
        error: str | None
        try:
            error = self._write_together(path, files)
        except Exception as exception:  # such as: another rank has died
            error = _described(exception)
        with self._lock:
            self._busy, self.failure = False, error
            if error is None:
                self._remove_doomed()
        if error is not None and self._rank == 0:
            rank_zero_warn(
                f"the checkpoint {path} could not be written ({error}); training continues, and earlier checkpoints "
                "are kept."
            )

    def _write_together(self, path: Path, files: Files) -> str | None:
        """Write, and return what went wrong, if anything, the same on every rank."""
        partial: PartialDirectory | None = None
        try:
            made: Path | str = path
            if self._rank == 0:
                try:
                    partial = PartialDirectory(path)
                    made = partial.path
                except OSError as error:
                    made = _described(error)
            made = self.share(made)[0]
            if isinstance(made, str):
                return made
            written: dict[str, Written] | str = {}
            try:
                written = {name: write(made / name) for name, write in files.items()}
            except Exception as error:
                written = _described(error)
            everyones = self.share(written)
            failure = next((theirs for theirs in everyones if isinstance(theirs, str)), None)
            if failure is None and partial is not None:
                try:
                    write_manifest(
                        partial.path, {name: entry for theirs in everyones for name, entry in theirs.items()}
                    )
                    partial.publish()
                except Exception as error:
                    failure = _described(error)
            return self.share(failure)[0]
        finally:
            if partial is not None:
                partial.close()

    def _remove_doomed(self) -> None:
        while self._doomed:
            remove_directory(self._doomed.pop())


def _described(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
