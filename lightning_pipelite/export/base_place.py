"""Whether there is a base model, by its directory alone; nothing long is imported for it."""

from __future__ import annotations

from pathlib import Path

from lightning_pipelite.errors import ConfigurationError


def check_base(directory: Path) -> None:
    """Refuse what is no directory of a model, or one with an adapter in it, which transformers would load as well.

    Raises:
        ConfigurationError: Naming it.
    """
    if not directory.is_dir():
        raise ConfigurationError(f"{directory} is not a directory; give that of a local Hugging Face model.")
    if (directory / "adapter_config.json").exists():
        raise ConfigurationError(f"{directory} also holds an adapter_config.json; move that adapter away.")
