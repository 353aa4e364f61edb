"""Checks for a base model by its directory alone, without slow imports."""

from __future__ import annotations

from pathlib import Path

from lightning_pipelite.errors import ConfigurationError


def check_base(directory: Path) -> None:
    """Refuse a path that is not a directory, or one that also holds an adapter, which transformers would load too.

    Raises:
        ConfigurationError: Either is the case.
    """
    if not directory.is_dir():
        raise ConfigurationError(f"{directory} is not a directory; give the directory of a local Hugging Face model.")
    if (directory / "adapter_config.json").exists():
        raise ConfigurationError(f"{directory} also holds an adapter_config.json; move that adapter elsewhere.")
