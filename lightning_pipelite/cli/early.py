"""Checks of a command line before torch is imported: unknown options and missing files."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_pipelite.cli.option_names import (
    FOREIGN,
    OWN,
    SENTENCES,
    meant_by,
    names_of_classes,
    option_names,
    parameters_of,
)
from lightning_pipelite.cli.option_values import refused_value
from lightning_pipelite.cli.option_words import (
    check_no_other_words,
    check_values_there,
    content_of,
    model_dir_of,
    models_of,
    options_of,
)
from lightning_pipelite.cli.sections import SECTIONS, check_sections
from lightning_pipelite.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_pipelite.cli.commands import Command

_OUR_ADAPTERS = ("ControlAdapter", "Full", "LoRA")
_REQUIRED = ("model.model_dir", "model.adapter", "data.datasets", "data.sequence_len")
_UNKNOWN = ""  # stands for an adapter class that is given in a way that is not read here
_OUR_FOLDERS = ("models", "output", "quickstart")  # used by the examples


def check_early(words: list[str]) -> None:
    """Refuse early what fit or validate would refuse after slow imports.

    Whatever is not known to be wrong is left to them.

    Args:
        words: The arguments after the subcommand.

    Raises:
        ConfigurationError: If an option is unknown, a value is not one of the few that its option takes, or a
            configuration file or the model does not exist.
    """
    check_no_other_words(words)
    names: list[tuple[str, str]] = []
    values: dict[str, str] = {}
    for name, value in options_of(words):
        if name in ("c", "config"):
            content = content_of(value)
            _check_file(value)
            check_sections(content, Path(value or ".").expanduser().parent)
            names += [(key, "") for key in _keys(content)]
            sections = {name: each for name, each in content.items() if isinstance(each, dict)}
            values |= {f"{name}.{key}": str(value) for name, each in sections.items() for key, value in each.items()}
        else:
            names.append((name, "--"))
            values[name] = str(value)
    check_values_there(words, option_names() - {*OWN})
    models = [*models_of(words)]
    is_ours = _is_ours(_adapter_of(models))
    for name, dashes in names:
        if is_ours or not name.startswith("model.adapter."):
            _check_name(name, dashes)
    for name, value in values.items():
        if (sentence := refused_value(name, value)) is not None:
            raise ConfigurationError(sentence)
    model_dir = model_dir_of(models)
    prints_only = any(word.startswith("--print_config") for word in words)
    if model_dir is not None and not prints_only:
        check_model_dir(model_dir)


def _check_file(given: str | None) -> None:
    """Refuse a file that does not hold a configuration."""
    from jsonargparse import ArgumentError

    from lightning_pipelite.cli.error_messages import check_config_file, explain

    try:
        if given is not None and "\n" not in given and ":" not in given:
            check_config_file(given)
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), {})) from None


def check_all_there(words: list[str]) -> None:
    """Refuse a command line without the options that fit and validate require, if all its options are read here.

    Args:
        words: Arguments that `check_early` has accepted.

    Raises:
        ConfigurationError: If options are missing; the message names all of them.
    """
    contents = [content_of(value) for name, value in options_of(words) if name in ("c", "config")]
    names = [name for name, _ in options_of(words) if name not in ("c", "config")]
    names += [key for content in contents for key in _keys(content)]
    elsewhere = any(name.startswith("PIPELITE_") for name in os.environ) or {*SECTIONS, "print_config"} & {*names}
    if elsewhere or not all(contents):
        return
    there = {".".join(name.replace("+", "").split(".")[:2]) for name in names}
    if missing := [name for name in _REQUIRED if name not in there]:
        raise ConfigurationError(
            f"{', '.join(missing)} must be given, in the configuration file or on the command line."
        )


def check_command(name: str, command: Command, words: list[str]) -> None:
    """Refuse unknown and missing options of a command other than fit, before its module is imported.

    Args:
        name: Name of the command.
        command: The command; its options are read from its function's source.
        words: The arguments after the command.

    Raises:
        ConfigurationError: If an option is unknown or missing, or given a name on Hugging Face's hub as a directory.
    """
    own = command.options
    for given, value in options_of(words):
        if given in ("base", "model_dir", "adapter") and value is not None:
            _check_hub(given, value)
        if given in (*own, "h", "help") or (given == "c" and command.reads_configuration):
            continue
        if command.reads_configuration:
            if not given.startswith("model.adapter.") or _is_ours(_adapter_of(models_of(words))):
                _check_name(given, "--", own)
            continue
        told = (meant_by(given, own) or f"pipelite {name} --help lists the options").replace(
            "did you mean ", "did you mean --"
        )
        raise ConfigurationError(f"{'-' if len(given) == 1 else '--'}{given} is not an option; {_ended(told)}")
    if not {"-h", "--help"} & {*words}:
        _check_parameters(command, words)


def _check_parameters(command: Command, words: list[str]) -> None:
    """Refuse a command line without the options that the command requires."""
    if command.positional:
        return
    given = {"config" if name == "c" else name for name, _ in options_of(words)}
    missing = [name for name, needed in parameters_of(command.module, command.function).items() if needed]
    missing = [name for name in missing if name not in given]
    if missing == ["config"] and command.reads_configuration:
        if not words:
            raise ConfigurationError("config must be given on the command line: --config FILE, as for fit.")
    elif missing:
        raise ConfigurationError(f"{', '.join(missing)} must be given on the command line.")


def check_model_dir(model_dir: str) -> None:
    """Refuse a model directory that does not exist.

    Raises:
        ConfigurationError: If there is no such directory; for a name on Hugging Face's hub, the message has the
            download command.
    """
    if Path(model_dir).expanduser().is_dir():
        return
    name = model_dir.rpartition("/")[2]
    if _may_be_of_the_hub(model_dir):
        raise ConfigurationError(
            f"{model_dir} is not a directory; model_dir must name a local Hugging Face model. If it is on the "
            f"Hugging Face Hub, download it: hf download {model_dir} --local-dir models/{name}, and give models/{name}."
        )
    raise ConfigurationError(f"{model_dir} is not a directory; model_dir must name a local Hugging Face model.")


def _may_be_of_the_hub(name: str) -> bool:
    owner = name.rpartition("/")[0]
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(owner).exists() and owner not in _OUR_FOLDERS


def _check_hub(option: str, given: str) -> None:
    """Refuse a name on Hugging Face's hub where a directory is required, and give the download command."""
    if not Path(given).exists() and _may_be_of_the_hub(given):
        folder = f"{'adapters' if option == 'adapter' else 'models'}/{given.rpartition('/')[2]}"
        raise ConfigurationError(
            f"--{option}: {given} is not a directory. If it is on the Hugging Face Hub, download it: hf download "
            f"{given} --local-dir {folder}, and give {folder}."
        )


def _keys(content: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted names of options in a file."""
    for name, value in content.items():
        if name not in SECTIONS or not isinstance(value, dict):
            yield str(name) if not isinstance(value, dict) else f"{name}.{next(iter(value), '')}"
            continue
        for key, inner in value.items():
            yield f"{name}.{key}"
            if (name, key) == ("model", "adapter") and isinstance(inner, dict):
                yield from (f"model.adapter.{each}" for each in inner.get("init_args") or {})


def _adapter_of(models: Iterable[dict[str, Any] | None]) -> Any:
    """Return the adapter as given last; None if there is none, ``_UNKNOWN`` if it may be given elsewhere."""
    elsewhere = (each for each in os.environ if each.startswith("PIPELITE_"))
    found: Any = _UNKNOWN if any("ADAPTER" in each or "CONFIG" in each for each in elsewhere) else None
    for model in models:
        given = _UNKNOWN if model is None else model.get("adapter.class_path", model.get("adapter", found))
        has_options_only = isinstance(given, dict) and "class_path" not in given
        found = found if has_options_only else given
    return found


def _is_ours(adapter: Any) -> bool:
    """Return whether an adapter class, as given, is one of this package's; others have options of their own."""
    path = adapter.get("class_path") if isinstance(adapter, dict) else adapter
    if path is None:
        return True
    return isinstance(path, str) and (path in _OUR_ADAPTERS or path.startswith("lightning_pipelite."))


def _check_name(given: str, dashes: str, others: Iterable[str] = ()) -> None:
    """Refuse an unknown option; options nested below a known one are left to its class."""
    name = given.replace("+", "")  # jsonargparse's suffix to append to a list
    parts = name.split(".")
    last = parts[-1]
    known = option_names()
    if name in known or parts[0] in OWN or last == "help" or name == "h":
        return
    if parts[0] in ("optimizer", "lr_scheduler"):  # options of a standard LightningCLI
        from lightning_pipelite.cli.error_messages import explain

        raise ConfigurationError(explain(f"unrecognized arguments: {dashes}{name}", {}))
    if ".".join(parts[:2]) in known:
        below_adapter = parts[:2] == ["model", "adapter"]
        if not (below_adapter and (last in SENTENCES or FOREIGN.get(last, "").startswith("model.adapter"))):
            near = _misspelt(parts)
            if near is None:
                return
            raise ConfigurationError(f"{dashes}{name} is not an option; did you mean {dashes}{near}?")
    elif parts[0] not in SECTIONS and not dashes and len(parts) > 1:
        return  # an unknown section in a file
    told = meant_by(name, {*known, *others, *names_of_classes()})
    if told is not None and dashes:
        told = told.replace("did you mean ", "did you mean --")
    raise ConfigurationError(f"{dashes}{name} is not an option; {_ended(told)}")


def _misspelt(parts: list[str]) -> str | None:
    """Return the option of this package's adapters that is closest to a misspelt one; None if none is close."""
    rest = [part for part in parts[2:] if part != "init_args"]
    there = {each.rpartition(".")[2]: each for each in names_of_classes() if each.startswith("model.adapter.")}
    if parts[:2] != ["model", "adapter"] or len(rest) != 1 or rest[0] in there:
        return None
    near = difflib.get_close_matches(rest[0], there, 1, cutoff=0.75)
    return there[near[0]] if near else None


def _ended(told: str | None) -> str:
    told = told or "pipelite fit --help-all lists the options"
    return told if told.endswith("?") else f"{told}."
