"""Checks of the data before torch is imported: their options, whether they exist, and what they hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pipelite.cli.option_words import content_of, model_dir_of, models_of, options_of
from lightning_pipelite.errors import ConfigurationError

_SECTION = "data"
# Options of the data module that do not affect packing.
_ELSEWHERE = ("tokenizer_dir", "eval_gradient_accumulation_steps", "isolate_documents", "cache_dir")


def check_data(words: Sequence[str]) -> None:
    """Refuse early, by the same functions, data that fit or validate would refuse after slow imports.

    What is not read here as they read it (environment variables, options within options) is left to them, as are
    missing options.

    Args:
        words: The arguments after the subcommand, whose option names have been checked.

    Raises:
        ConfigurationError: If an option is out of range, files are missing or ambiguous, or their first records cannot
            be read.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":  # the first process of the host checks for all
        return
    own = _of_data(words)
    given_elsewhere = any(name.startswith("PIPELITE_") and ("DATA" in name or "CONFIG" in name) for name in os.environ)
    if not own or given_elsewhere or any(word.startswith("--print_config") for word in words):
        return
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    from lightning_pipelite.cli.error_messages import explain
    from lightning_pipelite.cli.null_values import refuse_nulls
    from lightning_pipelite.data.config import PackingOptions
    from lightning_pipelite.data.looking import first_look
    from lightning_pipelite.data.templates import read_template

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(PackingOptions, _SECTION, skip={"shapes"}, sub_configs=True)
    try:
        given = parser.parse_args(own)
    except ArgumentError as error:
        if re.search("Parser key .*arguments are required|^(?!.*arguments are required)", str(error), re.DOTALL):
            raise ConfigurationError(explain(str(error), {"fit": parser})) from None
        return  # fit lists everything that is missing
    refuse_nulls(_SECTION, PackingOptions, given[_SECTION].as_dict())
    options: PackingOptions = parser.instantiate_classes(given)[_SECTION]
    if options.chat_template is not None:
        read_template(options.chat_template)
    model_dir = model_dir_of(models_of(words))
    first_look(options, Path(model_dir).expanduser() if model_dir else None)


def _of_data(words: Sequence[str]) -> list[str]:
    """Return the data options as given; none if they are given in a way that is not read here."""
    found: list[str] = []
    for name, value in options_of(words):
        section, _, key = name.partition(".")
        if name in ("c", "config"):
            if value is None or not Path(value).expanduser().is_file():
                return []
            content = content_of(value)
            given = content.get(_SECTION, {})
            if not content or not isinstance(given, dict) or _names_files(given, Path(value).expanduser().parent):
                return []
            kept = {key: each for key, each in given.items() if key not in _ELSEWHERE}
            kept |= {"eval_datasets": []} if kept.get("eval_datasets", []) is None else {}
            found += ["--config", json.dumps({_SECTION: kept}, default=str)]
        elif section == _SECTION:
            if not key or value is None or (key == "eval_datasets" and value in ("null", "~")):
                return []
            if key not in _ELSEWHERE:
                found.append(f"--{name}={value}")
    return found


def _names_files(given: dict[str, Any], folder: Path) -> bool:
    """Return whether a file's options name other files for its datasets, which are looked up relative to it."""
    named = [each for key, value in given.items() if "datasets" in key for each in (value, *_listed(value))]
    return any(isinstance(each, str) and (folder / each).is_file() for each in named)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
