"""The words of a command line, and the configuration files that they name, before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError


def options_of(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options with their values; of a short one that is joined with its value, none."""
    for word, then in zip(words, [*words[1:], ""], strict=False):
        if re.match(r"--?[A-Za-z]", word):
            if re.match(r"-c(?!onfig\b)[^=]", word):
                yield "c", None
                continue
            name, equals, value = word.partition("=")
            yield name.lstrip("-"), value if equals else then or None


def content_of(file: str | None) -> dict[str, Any]:
    """Read what a configuration file holds; nothing where it is told later what is wrong with it."""
    if file is None or "\n" in file or ":" in file:  # YAML itself may be given
        return {}
    path = Path(file).expanduser()
    if not path.exists():
        raise ConfigurationError(f"--config: File does not exist: '{Path.cwd() / path}'; give a YAML or JSON file.")
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
