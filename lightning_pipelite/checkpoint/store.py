"""The strategy's interface to the checkpoints of a run."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pipelite.checkpoint import layout
from lightning_pipelite.checkpoint.encoding import decode, encode
from lightning_pipelite.checkpoint.manifest import check_files, read_manifest
from lightning_pipelite.checkpoint.reader import located, read_json, trainer_state
from lightning_pipelite.checkpoint.stage_state import (
    check_optimizer,
    load_optimizer,
    load_parameters,
    stage_state,
    state_names,
)
from lightning_pipelite.checkpoint.tensor_file import HostCopy, size_of
from lightning_pipelite.checkpoint.writer import CheckpointWriter
from lightning_pipelite.checkpoint.written_file import Written, write_file
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.finite import refuse_not_finite
from lightning_pipelite.shared.topology import Topology


class CheckpointStore:
    """Saves and loads checkpoints. All methods but ``wait`` and ``remove`` are collective.

    Args:
        topology: Topology of the job.
        rank: Rank of this process.
        device: Device of its stage.
        timeout: How long a rank may take to write its files.
    """

    def __init__(self, topology: Topology, rank: int, device: torch.device, timeout: timedelta) -> None:
        self._topology = topology
        self._stage_id, self._leads = topology.stage_of(rank), rank == 0
        self._writes = topology.replica_of(rank) == 0
        self._rank, self._world_size = rank, topology.world_size
        self._writer = CheckpointWriter(rank, topology.world_size, timeout)
        self._copy, self._trainer_copy = HostCopy(device), HostCopy(torch.device("cpu"))
        self._loaded: tuple[Path, dict[str, Any]] | None = None

    def save(
        self, path: Path, state: dict[str, Any], meta: dict[str, Any], stage: nn.Module, optimizer: Optimizer | None
    ) -> None:
        """Copy everything to host memory and return; the files are written in the background.

        Args:
            path: Directory to write; an older checkpoint of that name is replaced.
            state: State of the Trainer; only rank 0's is written.
            meta: Content of ``meta.json``, without the time of writing.
            stage: This rank's stage.
            optimizer: Its optimizer, if the optimizer state is to be saved.

        Raises:
            ConfigurationError: If ``state`` or the optimizer state holds something that cannot be written.
            RuntimeError: On every rank, if a trained parameter or the optimizer's state is not finite.
        """
        self._writer.wait()  # it reads from the memory that is about to be overwritten
        files: dict[str, Callable[[Path], Written]] = {}
        tensors: dict[str, Tensor] = {}
        if self._writes:
            tensors, settings = stage_state(stage, optimizer)
            self._copy.take(tensors)
            files[layout.STAGE_TENSORS.format(self._stage_id)] = self._copy.write
            files[layout.STAGE_SETTINGS.format(self._stage_id)] = _json_writer(settings)
        if self._leads:
            with contextlib.suppress(OSError):  # reported by the writer
                # Now rather than in the background: ModelCheckpoint may put a link there.
                path.absolute().parent.mkdir(parents=True, exist_ok=True)
            kept: dict[str, Tensor] = {}
            encoded = encode(state, kept)
            self._trainer_copy.take(kept)
            files[layout.TRAINER] = _json_writer(encoded)
            files[layout.TRAINER_TENSORS] = self._trainer_copy.write
            files[layout.META] = _json_writer({**meta, "written_at": time.time()})
        if self._writes:
            self._copy.finish()  # late, so that the work above overlaps with the copy
        kinds = (layout.PARAMETER, layout.OPTIMIZER)  # not buffers: masks hold infinities
        trained = {name.removeprefix(kinds[0]): t for name, t in tensors.items() if name.startswith(kinds)}
        refuse_not_finite(f"the checkpoint {path}", trained, self._topology, self._writer.share)
        self._writer.start(path.absolute(), files)

    def reserve(self, stage: nn.Module, optimizer: Optimizer) -> None:
        """Allocate the host memory for a checkpoint, so that not even the first save waits for it."""
        if self._writes:
            self._copy.reserve(size_of(stage_state(stage, optimizer)[0]))

    def remove(self, path: Path) -> None:
        """Remove a checkpoint once all pending writes are safely on disk. Called on rank 0."""
        self._writer.remove(path.absolute())

    def promised(self, path: Path) -> bool | None:
        """Return whether a checkpoint will exist once pending work is done; None if nothing is pending. On rank 0."""
        return self._writer.promised(path.absolute())

    @property
    def closed(self) -> bool:
        """Whether training has ended, so that nothing will wait for what is saved now."""
        return self._writer.closed

    @property
    def failure(self) -> str | None:
        """Why the last write failed, or None; not to be read while something is being written."""
        return self._writer.failure

    def share(self, mine: Any) -> list[Any]:
        """Gather ``mine`` from every rank."""
        self._writer.wait()
        return self._writer.share(mine)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is being written, or for at most ``seconds``."""
        self._writer.wait(seconds)

    def close(self) -> None:
        """Wait for pending writes, and free the host memory."""
        self._writer.close()
        self._copy.release()

    def open(
        self, path: Path, identity: dict[str, Any], may_differ: Mapping[str, tuple[bool, str]] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Check a checkpoint against its manifest, each rank some of the files, and read the Trainer's state.

        Args:
            path: The checkpoint; rank 0's value counts.
            identity: Identity of the model and of what is trained, as in ``meta``.
            may_differ: Keys of it that may differ: whether that is allowed, and the option that allows it.

        Returns:
            The Trainer's state and ``meta``.

        Raises:
            ConfigurationError: If it is damaged, or of another model or adapter; the same on every rank.
        """
        self._writer.wait()
        path = located(self._writer.share(path.absolute())[0])
        self._loaded = None

        def check() -> None:
            files = read_manifest(path)
            check_files(path, files, sorted(files)[self._rank :: self._world_size])

        self._together(check)
        meta = read_json(path / layout.META)
        refuse_another(path, meta["identity"], identity, may_differ or {})
        encoded, tensors = trainer_state(path)
        self._loaded = path, meta
        return decode(encoded, tensors), meta

    def load_parameters(self, stage: nn.Module, strict: bool = True) -> None:
        """Load this rank's trained parameters from the checkpoint that was opened last.

        Args:
            stage: The stage to load them into.
            strict: Whether the checkpoint must hold exactly these; otherwise differences are reported as warnings.

        Raises:
            ConfigurationError: If it is of another model or adapter; the same on every rank.
        """
        assert self._loaded is not None
        path, meta = self._loaded
        names = set().union(*self._writer.share(state_names(stage)))
        differs: list[tuple[list[str], list[str]]] = []
        self._together(lambda: differs.append(load_parameters(path, meta["stages"], stage, names, strict)))
        everyones = self._writer.share(differs[0])
        for index, what in enumerate(
            ("does not hold {}: initial values are kept", "holds {}: this is ignored, as it is not trained here")
        ):
            if found := sorted({name for theirs in everyones for name in theirs[index]}):
                rank_zero_warn(f"{path} {what.format(', '.join(found))} (strict_loading is False).")

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse the checkpoint that was opened last if it is of another optimizer.

        Raises:
            ConfigurationError: If it is of another class, or has other groups; the same on every rank.
        """
        assert self._loaded is not None
        path, meta = self._loaded

        def check() -> None:
            check_optimizer(path, meta["stages"], optimizer)

        self._together(check)

    def load_optimizer(self, stage: nn.Module, optimizer: Optimizer) -> None:
        """Load the state of this rank's optimizer from the checkpoint that was opened last.

        Raises:
            ConfigurationError: If it is of another optimizer; the same on every rank.
        """
        assert self._loaded is not None
        path, meta = self._loaded
        self._together(lambda: load_optimizer(path, meta["stages"], stage, optimizer))

    def _together(self, action: Callable[[], None]) -> None:
        """Run ``action`` on every rank; if it fails on one, raise its error on all."""
        failure: str | None = None
        try:
            action()
        except ConfigurationError as error:
            failure = str(error)
        if failure := next((theirs for theirs in self._writer.share(failure) if theirs), None):
            raise ConfigurationError(failure)


def refuse_another(
    path: Path, saved: dict[str, Any], ours: dict[str, Any], may_differ: Mapping[str, tuple[bool, str]]
) -> None:
    """Refuse a checkpoint of another model or adapter.

    Args:
        path: The checkpoint, for the message.
        saved: Its identity: any JSON that the module provides.
        ours: The identity of what is to be trained.
        may_differ: Keys that may differ: whether that is allowed, and the option that allows it.

    Raises:
        ConfigurationError: Naming the first key that differs.
    """
    for key in sorted(saved.keys() | ours.keys()):
        theirs, mine = saved.get(key), json.loads(json.dumps(ours.get(key)))
        if isinstance(theirs, dict) and isinstance(mine, dict):
            theirs, mine = ({f"{key}.{name}": value for name, value in each.items()} for each in (theirs, mine))
            refuse_another(path, theirs, mine, may_differ)
        elif theirs != mine:
            allowed, option = may_differ.get(key, (False, ""))
            differs = f"{key} is {theirs!r} in the checkpoint, {mine!r} now"
            told = f"ckpt_path: {path} is from another model or adapter: {differs}"
            if not allowed:
                remedy = f"; set {option} to true to continue anyway" if option else ""
                raise ConfigurationError(f"{told}{remedy}.")
            rank_zero_warn(f"{told}; training continues, as {option} is set.")


def _json_writer(content: Any) -> Callable[[Path], Written]:
    text = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    return lambda path: write_file(path, text)
