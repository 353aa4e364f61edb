"""Reads checkpoints without Lightning or DeepSpeed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_pipelite.checkpoint.directory import former_of, is_temporary, target_of
from lightning_pipelite.checkpoint.layout import (
    MANIFEST,
    MANIFEST_HASH,
    META,
    PARAMETER,
    STAGE_SETTINGS,
    STAGE_TENSORS,
    TRAINER,
    TRAINER_TENSORS,
)
from lightning_pipelite.checkpoint.manifest import ADVICE, check_files, read_manifest
from lightning_pipelite.errors import ConfigurationError


def read_checkpoint(directory: str | Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return a checkpoint's metadata and its trained parameters.

    Args:
        directory: The checkpoint. Every file is first checked against its hash.

    Returns:
        The content of ``meta.json`` (see docs/checkpoints.md), and an iterator over the trained parameters by name, on
        the CPU, each read from disk on demand. A parameter that several stages share is yielded once.

    Raises:
        ConfigurationError: If this is not an intact checkpoint.
    """
    path = located(Path(directory))
    meta = check_whole(path)
    return meta, stage_tensors(path, meta["stages"], lambda key: key.startswith(PARAMETER), len(PARAMETER))


def located(path: Path) -> Path:
    """Return the checkpoint of that name, even if a process was killed while replacing it."""
    return former_of(path) or path


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory was written as a checkpoint, intact or not: others have none of these files."""
    return any((path / name).is_file() for name in (MANIFEST_HASH, STAGE_TENSORS.format(0)))


def check_whole(path: Path) -> dict[str, Any]:
    """Check every file against its hash, and return the content of ``meta.json``.

    Raises:
        ConfigurationError: If this is not an intact checkpoint.
    """
    files = read_manifest(path)
    check_files(path, files, files)
    return read_json(path / META)


def read_json(path: Path) -> Any:
    """Return a JSON file of a checkpoint."""
    with _explained(path):
        return json.loads(path.read_text(encoding="utf-8"))


def stage_tensors(
    path: Path, stages: int, wanted: Callable[[str], bool], skip: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yield the ``wanted`` tensors of all stages, each once, without the first ``skip`` characters of their names."""
    seen: set[str] = set()
    for stage in range(stages):
        with _opened(path / STAGE_TENSORS.format(stage)) as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                if key not in seen and wanted(key):
                    seen.add(key)
                    yield key[skip:], opened.get_tensor(key)


def stage_settings(path: Path, stages: int) -> list[dict[str, Any]]:
    """Return the settings of each stage's optimizer."""
    return [read_json(path / STAGE_SETTINGS.format(stage)) for stage in range(stages)]


def trainer_state(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the Trainer's state as JSON, and the tensors that it refers to."""
    with _opened(path / TRAINER_TENSORS) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    return read_json(path / TRAINER), tensors


def newest(directories: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint in some directories.

    Returns:
        Its path, or None if there is no checkpoint at all; and a sentence about each newer one that is damaged.

    Raises:
        ConfigurationError: If there are checkpoints but none is intact: training must not silently start from scratch.
    """
    found = [path for directory in directories if directory.is_dir() for path in _whole_or_replaced(directory)]
    passed_over: list[str] = []
    for path in sorted((path for path in found if _looks_like_one(path)), key=_written_at, reverse=True):
        try:
            check_whole(path)
        except ConfigurationError as error:
            passed_over.append(str(error).removeprefix("ckpt_path: ").partition(";")[0])
        else:
            return path, passed_over
    if passed_over:
        raise ConfigurationError(
            f"ckpt_path: there is no intact checkpoint for `last`: {'; '.join(passed_over)}; leave ckpt_path out to "
            "start from scratch."
        )
    return None, []


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _explained(path), safe_open(path, framework="pt") as opened:
        yield opened


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Report a file that cannot be read although its hash is right: someone has rewritten both."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"ckpt_path: {path} cannot be read ({error}); {ADVICE}.") from None


def _looks_like_one(path: Path) -> bool:
    return any((path / name).exists() for name in (MANIFEST, MANIFEST_HASH, META))


def _whole_or_replaced(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if not is_temporary(path) or former_of(target_of(path)) == path:
            yield path


def _written_at(path: Path) -> tuple[float, str]:
    """Return when it was written, by its metadata: copying may change file times, which are only the fallback."""
    try:
        meta = read_json(path / META)
        return float(meta["written_at"]), path.name
    except (ConfigurationError, ValueError, LookupError, TypeError):
        return path.stat().st_mtime, path.name
