"""The words of a command line, and the configuration files that they name, before torch is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
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


def check_no_other_words(words: Sequence[str]) -> None:
    """Refuse a word that is neither an option nor the value of one.

    Raises:
        ConfigurationError: If there is one; of a file, with what may be meant.
    """
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-") or (re.match(r"--?[A-Za-z]", before) and "=" not in before):
            continue
        sentence = f"{word} is not an option; "
        if Path(word).suffix in (".yaml", ".yml"):
            raise ConfigurationError(f"{sentence}did you mean --config {word}?")
        if before and Path(word).exists():
            raise ConfigurationError(f"{sentence}if it is one of several files, put quotes around their pattern.")
        raise ConfigurationError(f"{sentence}pipelite fit --help lists the options.")


def without_value(option: str) -> str:
    """Refuse an option, with its dashes, behind which there is nothing."""
    return f"{option} is given without a value; write one behind it."


def check_values_there(words: Sequence[str], names: Collection[str]) -> None:
    """Refuse an option behind which another option comes, or nothing.

    Args:
        words: Of the command line.
        names: Of the options that take a value.

    Raises:
        ConfigurationError: Naming it.
    """
    for word, then in zip(words, [*words[1:], "--end"], strict=False):
        if word.startswith("--") and word[2:] in names and re.match("--[a-z]", then):
            raise ConfigurationError(without_value(word))


def content_of(file: str | None) -> dict[str, Any]:
    """Read what a configuration file holds; nothing where it is told later what is wrong with it."""
    if file is None or "\n" in file or ":" in file:  # YAML itself may be given
        return {}
    path = Path(file).expanduser()
    if not path.exists():
        raise ConfigurationError(f"--config: File does not exist: '{Path.cwd() / path}'; give a YAML or JSON file.")
    if path.is_dir():
        raise ConfigurationError(f"--config: Path is not a file: '{Path.cwd()}/{file}'; give a YAML or JSON file.")
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return _nested(content) if isinstance(content, dict) else {}


def _nested(content: dict[Any, Any]) -> dict[str, Any]:
    """Put what a file says as ``data.seed: 1`` into its section."""
    made: dict[str, Any] = {}
    for name, value in content.items():
        section, _, key = str(name).partition(".")
        if key and isinstance(made.get(section, {}), dict):
            made[section] = {**made.get(section, {}), key: value}
        elif isinstance(value, dict) and isinstance(made.get(str(name)), dict):
            made[str(name)] = {**made[str(name)], **value}
        else:
            made[str(name)] = value
    return made


def model_dir_of(words: Sequence[str]) -> str | None:
    """Give the directory of the model, which is its tokenizer's, too; None where it is not read here."""
    found: str | None = None
    for name, value in options_of(words):
        if name in ("c", "config"):
            model = content_of(value).get("model", {})
            given = model.get("model_dir", found) if isinstance(model, dict) else None
            found = given if isinstance(given, str) else None
        elif name in ("model", "model.model_dir"):
            found = value if name == "model.model_dir" else None
    return None if any(name.startswith("PIPELITE_") and "MODEL" in name for name in os.environ) else found
