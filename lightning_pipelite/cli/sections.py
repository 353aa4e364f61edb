"""The sections of a configuration, and what is the same in two of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError

SECTIONS = ("trainer", "model", "data")

LINKS = {"data.tokenizer_dir": "model.model_dir"}
"""Options that are always another one's value."""


def is_linked(target: str, source: str) -> str:
    """Refuse an option that is always another one's value."""
    return f"{target} is always {source}; leave it out."


def is_no_section(name: str, given: object) -> str:
    """Refuse what stands where a section's options should."""
    instead = ", or the name of a file that holds them" if isinstance(given, str) else ""
    return f"{name} is {given!r}; put the options of {name} there{instead}."


def check_sections(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse a section that holds no options, nor the name of a file with them.

    Args:
        content: Of a configuration file.
        folder: Where the file is.

    Raises:
        ConfigurationError: Naming the section.
    """
    for name in SECTIONS:
        given = content.get(name, {})
        is_word = isinstance(given, str) and re.fullmatch(r"\w+", given)
        if (is_word and not Path(given).exists() and not (folder / given).exists()) or isinstance(given, (int, float)):
            raise ConfigurationError(is_no_section(name, given))
