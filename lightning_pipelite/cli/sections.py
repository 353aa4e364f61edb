"""The sections of a configuration, and the options that are linked between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError

SECTIONS = ("trainer", "model", "data")

LINKS = {"data.tokenizer_dir": "model.model_dir"}
"""Options that always have the value of another one."""


def is_linked(target: str, source: str) -> str:
    """Return the message that refuses an option which always has the value of another one."""
    return f"{target} is always {source}; leave it out."


def is_no_section(name: str, given: object) -> str:
    """Return the message that refuses a section without options."""
    instead = ", or name a file with them" if isinstance(given, str) else ""
    return f"{name} is {given!r}; it must hold the options of {name}{instead}."


def check_sections(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse a section that is neither options nor the name of a file with them.

    Args:
        content: Content of a configuration file.
        folder: Directory of the file.

    Raises:
        ConfigurationError: If there is one; the message names it.
    """
    for name in SECTIONS:
        given = content.get(name, {})
        is_word = isinstance(given, str) and re.fullmatch(r"\w+", given)
        if (is_word and not Path(given).exists() and not (folder / given).exists()) or isinstance(given, (int, float)):
            raise ConfigurationError(is_no_section(name, given))
