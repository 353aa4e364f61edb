"""The size of a model's weight files, whether they are on disk or still to be downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.weight_files import INDEX_FILE, missing_files, pickled_files, read_json, weight_files


@dataclass(frozen=True)
class DiskSize:
    """The bytes of a model's weight files.

    Attributes:
        size: Of all files.
        here: Of the files on disk.
        exact: Whether ``size`` comes from the files or their index; otherwise it is estimated from config.json.
    """

    size: int
    here: int
    exact: bool

    def __str__(self) -> str:
        told = f"{'' if self.exact else 'about '}{_gigabytes(self.size)}"
        if self.here >= self.size:
            return f"{told} on disk"
        return f"{told} to download" + (f", {_gigabytes(self.here)} of it already on disk" if self.here else "")


def disk_size(meta_model: MetaModel) -> DiskSize:
    """Return the size of the weight files: from the files, from their index, or from the shapes in config.json."""
    directory = meta_model.model_dir
    files = weight_files(directory) or [path for path in pickled_files(directory) if path.exists()]
    here = sum(path.stat().st_size for path in files if path.exists())
    if files and all(path.exists() for path in files) and not missing_files(directory):
        return DiskSize(here, here, exact=True)
    index = directory / INDEX_FILE
    if index.exists():
        metadata = read_json(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(total, int) and total > 0:
            return DiskSize(total, min(here, total - 1), exact=True)
    weights = sum(p.numel() for p in meta_model.model.parameters())
    size = weights * _element_size(read_json(directory / "config.json"))
    if meta_model.stored is not None:  # mostly the layers' matrices: an estimate, as the files are missing
        matrices = sum(p.numel() for layer in meta_model.layers for p in layer.parameters() if p.ndim > 1)
        size = int(size - matrices * (2 - meta_model.stored.bits / 8))
    return DiskSize(size, min(here, size - 1), exact=False)


def _element_size(config: dict[str, Any]) -> int:
    """Return the bytes per weight in the files, as config.json gives it; if it does not, two, the usual size."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        name = part.get("dtype") or part.get("torch_dtype")
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype.itemsize
    return 2


def _gigabytes(size: int) -> str:
    """Format a size in decimal units, as is usual for downloads."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
