"""The manifest lists the files of a checkpoint with their sizes and hashes; a checkpoint that differs is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_pipelite.checkpoint.layout import FORMAT, MANIFEST, MANIFEST_HASH, VERSION
from lightning_pipelite.checkpoint.written_file import Written, write_file
from lightning_pipelite.errors import ConfigurationError

ADVICE = "name another checkpoint, or use `last` for the newest intact one"


def write_manifest(directory: Path, files: dict[str, Written]) -> None:
    """Write the manifest of ``files``, and the manifest's hash in the format of sha256sum."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "files": {name: asdict(written) for name, written in sorted(files.items())},
    }
    written = write_file(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
    write_file(directory / MANIFEST_HASH, f"{written.sha256}  {MANIFEST}\n".encode())


def read_manifest(directory: Path) -> dict[str, Written]:
    """Return the files of a checkpoint, from its manifest.

    Raises:
        ConfigurationError: If this is not a checkpoint, its manifest is damaged, or its version differs.
    """
    if directory.is_file() and _is_lightnings(directory):
        raise ConfigurationError(
            f"ckpt_path: {directory} is a file that Lightning wrote under another strategy, whose optimizer state and "
            "position in the data cannot be restored here: load only its weights, for example with the module's "
            "load_from_checkpoint(), and start a new training from them."
        )
    if not (directory / MANIFEST).is_file():
        raise ConfigurationError(
            f"ckpt_path: {directory} is not a checkpoint (a directory with {MANIFEST}); name one, or leave "
            "ckpt_path out."
        )
    try:
        content = (directory / MANIFEST).read_bytes()
        expected = (directory / MANIFEST_HASH).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"ckpt_path: {directory} cannot be read ({error}); {ADVICE}.") from None
    if expected != f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode():
        raise ConfigurationError(f"ckpt_path: {MANIFEST} of {directory} does not match its hash; {ADVICE}.")
    manifest: dict[str, Any] = json.loads(content)
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        raise ConfigurationError(
            f"ckpt_path: {directory} is in version {manifest['version']} of the format {manifest['format']!r}, but "
            f"this version of pipelite reads version {VERSION} of {FORMAT!r}: use the version that wrote it."
        )
    return {name: Written(**entry) for name, entry in manifest["files"].items()}


def check_files(directory: Path, files: dict[str, Written], names: Iterable[str]) -> None:
    """Check files against the manifest.

    Args:
        directory: The checkpoint.
        files: From :func:`read_manifest`.
        names: The files whose hashes are checked; sizes are always checked for all.

    Raises:
        ConfigurationError: For the first file that is missing, truncated or altered.
    """
    for name, expected in files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError:
            raise ConfigurationError(f"ckpt_path: {directory} is missing the file {name}; {ADVICE}.") from None
        if size != expected.size:
            raise ConfigurationError(
                f"ckpt_path: {name} of {directory} has {size} bytes, not {expected.size}; {ADVICE}."
            )
    for name in names:
        if _hash_of(directory / name) != files[name].sha256:
            raise ConfigurationError(f"ckpt_path: {name} of {directory} does not match its hash; {ADVICE}.")


def _is_lightnings(file: Path) -> bool:
    """Return whether a file begins as torch.save writes it: as a zip archive or, before those, as a pickle."""
    try:
        with file.open("rb") as opened:
            return opened.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\n")
    except OSError:
        return False


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(16 * 2**20):
            digest.update(chunk)
    return digest.hexdigest()
