"""Command-line arguments, and the configuration files that they name, read before torch is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError


def options_of(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options with their values; the value is None for a short option joined with it (``-cFILE``)."""
    for word, then in zip(words, [*words[1:], ""], strict=False):
        if re.match(r"--?[A-Za-z]", word):
            if re.match(r"-c(?!onfig\b)[^=]", word):
                yield "c", None
                continue
            name, equals, value = word.partition("=")
            yield name.lstrip("-"), value if equals else then or None


def check_no_other_words(words: Sequence[str]) -> None:
    """Refuse an argument that is neither an option nor the value of one.

    Raises:
        ConfigurationError: If there is one; for a file, the message suggests what may be meant.
    """
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-") or (re.match(r"--?[A-Za-z]", before) and "=" not in before):
            continue
        sentence = f"{word} is not an option; "
        if Path(word).suffix in (".yaml", ".yml"):
            raise ConfigurationError(f"{sentence}did you mean --config {word}?")
        if before and Path(word).exists():
            raise ConfigurationError(f"{sentence}if the shell expanded a pattern, put the pattern in quotes.")
        raise ConfigurationError(f"{sentence}pipelite fit --help lists the options.")


def without_value(option: str) -> str:
    """Return the message that refuses an option, named with its dashes, that has no value."""
    return f"{option} has no value; write one after it."


def check_values_there(words: Sequence[str], names: Collection[str]) -> None:
    """Refuse an option that is followed by another option, or by nothing, instead of its value.

    Args:
        words: The command-line arguments.
        names: Names of the options that take a value.

    Raises:
        ConfigurationError: If there is one; the message names it.
    """
    for word, then in zip(words, [*words[1:], "--end"], strict=False):
        if word.startswith("--") and word[2:] in names and re.match("--[a-z]", then):
            raise ConfigurationError(without_value(word))


def content_of(file: str | None) -> dict[str, Any]:
    """Read a configuration file; return nothing if its content is wrong, which is reported later."""
    if file is None or "\n" in file or ":" in file:  # inline YAML
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
    """Move dotted keys of a file, such as ``data.seed: 1``, into their sections."""
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


def models_of(words: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """Yield what each file and option sets of the model, in order; None for a file that is not read here."""
    for name, value in options_of(words):
        if name in ("c", "config"):
            content = content_of(value)
            model = content.get("model", {}) if content else None
            yield model if isinstance(model, dict) else None
        elif name == "model":
            yield None
        elif name.startswith("model."):
            yield {name.removeprefix("model."): value}


def model_dir_of(models: Iterable[dict[str, Any] | None]) -> str | None:
    """Return the directory of the model and its tokenizer; None if it is given in a way that is not read here.

    Args:
        models: What :func:`models_of` yields.
    """
    found: str | None = None
    for model in models:
        given = None if model is None else model.get("model_dir", found)
        found = given if isinstance(given, str) else None
    return None if any(name.startswith("PIPELITE_") and "MODEL" in name for name in os.environ) else found
