"""Checks for a checkpoint to convert, without slow imports."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_pipelite.checkpoint.directory import former_of
from lightning_pipelite.checkpoint.manifest import read_manifest
from lightning_pipelite.errors import ConfigurationError

FORMER_FILE = re.compile(r"layer_(\d+)(?:-model_00)?-model_states\.pt")
"""Files of a qlora-pipe-lite checkpoint: one for each item of its pipeline."""


def directory_of(checkpoint: str) -> Path:
    """Return the directory of a checkpoint.

    Raises:
        ConfigurationError: It is not a directory.
    """
    directory = Path(checkpoint)
    if not directory.is_dir():
        raise ConfigurationError(f"--checkpoint: {checkpoint} is not a directory; give the directory of a checkpoint.")
    return directory


def check_checkpoint(checkpoint: str) -> None:
    """Refuse what is not a checkpoint of this project or of qlora-pipe-lite; reads its manifest at most.

    Raises:
        ConfigurationError: Naming what it lacks.
    """
    directory = directory_of(checkpoint)
    if not is_former(directory):
        try:
            read_manifest(former_of(directory) or directory)
        except ConfigurationError as error:
            raise of_option(error, directory) from None


def of_option(error: ConfigurationError, checkpoint: Path) -> ConfigurationError:
    """Reword an error about ``ckpt_path`` as one about the option ``--checkpoint``."""
    found = sorted(path.parent.name for path in checkpoint.glob("*/manifest.json"))
    advice = f"; give one of the checkpoints in it, such as {found[-1]}" if found else ""
    said = str(error).removeprefix("ckpt_path: ").partition(";")[0].rstrip(".")
    return ConfigurationError(f"--checkpoint: {said}{advice or '; name another checkpoint'}.")


def is_former(directory: Path) -> bool:
    """Return whether a directory holds a checkpoint of qlora-pipe-lite."""
    return any(FORMER_FILE.fullmatch(path.name) for path in latest(directory).iterdir())


def latest(directory: Path) -> Path:
    """Return the checkpoint that a qlora-pipe-lite run directory names as its latest, else the directory itself."""
    marker = directory / "latest"
    if marker.is_file() and (directory / marker.read_text(encoding="utf-8").strip()).is_dir():
        return directory / marker.read_text(encoding="utf-8").strip()
    return directory
