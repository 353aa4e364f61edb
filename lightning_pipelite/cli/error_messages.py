"""One-sentence messages for mistakes on the command line, in a file or in the environment."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from argparse import Action, ArgumentParser
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError

from lightning_pipelite.cli.null_values import is_null
from lightning_pipelite.cli.option_names import meant_by, names_of_classes
from lightning_pipelite.cli.option_values import proposed
from lightning_pipelite.cli.option_words import without_value
from lightning_pipelite.cli.sections import SECTIONS, is_linked, is_no_section
from lightning_pipelite.errors import ConfigurationError

ENV_PREFIX = "PIPELITE"

_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
}


_ELSEWHERE = {
    "--optimizer": "set --model.optimizer instead",
    "optimizer": "set model.optimizer instead",
    "--lr_scheduler": "set --model.schedule instead",
    "lr_scheduler": "set model.schedule instead",
}
"""Options of a standard LightningCLI, and what replaces them here."""

_DATASETS = ("data.datasets", "data.eval_datasets")

_TYPE_ERRORS = (
    "Expected a",
    "Problem with given class_path",
    "Not a valid subclass",
    "Subclass types",
    "a class path",
    "a dict with",
    "Parser key",
)


def explain(message: str, parsers: Mapping[str, ArgumentParser]) -> str:
    """Turn jsonargparse's message, an indented tree of lines, into a sentence.

    Args:
        message: The message of jsonargparse.
        parsers: The parsers of the subcommands, whose options are suggested for misspelt ones.
    """
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    text = " ".join(lines)
    # The tree names the option from the outside in: "model.adapter", then "rank".
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))

    def found(pattern: str) -> str | None:
        match = re.search(pattern, text)
        return match[1] if match else None

    # The most specific patterns come first: for a union of types, the message has a reason for each of them.
    if name := found(r"unrecognized arguments: (\S+)") or found(r"does not accept option '([^']+)'"):
        if "convert" in parsers and Path(name).is_dir():
            return f"{name} is not an option; give it as --checkpoint {name}, and the directory to write as --output."
        return f"{name} is not an option; {_proposal(name, parsers)}"
    if name := found(r"Option '([^']+)' is not accepted"):
        remedy = meant_by(name, ()) or _sibling(key, name) or "correct its name or remove it"
        return f"{key}.{name} is not an option; {remedy if remedy.endswith('?') else f'{remedy}.'}"
    if names := found(r"the following arguments are required: ([\w.]+(?:, [\w.]+)*)"):
        missing = [name.split(".", 1)[1] if name.split(".")[0] in parsers else name for name in names.split(", ")]
        missing = [f"{key}.{name}" if key else name for name in missing]
        return f"{', '.join(missing)} must be given, in the configuration file or on the command line."
    reason = _after(lines, "Problem with given class_path")
    if reason and "Parser key" not in reason:  # otherwise an option of that class is wrong
        name = found(r"Problem with given class_path '([^']+)'")
        option = f"{key}: " if key else ""
        return f"{option}class_path {name} cannot be imported ({reason}); correct it, or install its dependencies."
    if key in _DATASETS and (given := found(r"(?:Got value|dot import path string): (.*?)(?: Subclass types.*)?$")):
        path = given if re.fullmatch(r"[\w./*~ -]+", given) else "texts/*.txt"
        return f"""{key} must be a list of datasets, not {given}; write '[{{"dataset_path": "{path}"}}]'."""
    if name := found(r"Expected a dot import path string: (\S+)"):
        return f"{key}: there is no class {name}; give its class_path, as in package.module.{name}."
    if wrong := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", text):
        return f"{key}: class_path {wrong[1]} is not a subclass of {wrong[2]}; give one that is."
    if problem := found(r'Parser key "config": (.*)'):
        return f"--config: {problem}; give a YAML or JSON file."
    if link := re.search(r"argument (\S+) --> (\S+):", text):
        return is_linked(link[2], link[1])
    if name := found(r"argument (?:-\w/)?(\S+): expected one argument"):
        return without_value(name)
    if value := found(r"Unable to load config '([^']+)'"):
        return is_no_section(key, value)
    if name := found(r"argument subcommand: invalid choice: '?([^' ]+)"):
        remedy = f"use pipelite {' or pipelite '.join(parsers)}; pipelite --help lists all commands."
        if name in ("test", "predict"):
            remedy = (
                "pipelite validate evaluates on the data of eval_fraction and eval_datasets; to use a trained model in "
                "other programs, run pipelite merge or pipelite export-gguf."
            )
        return f"{name} is not a command; {remedy}"
    if text.startswith('expected "subcommand"'):
        return f"no command is given; use pipelite {' or pipelite '.join(parsers)}."
    if factory := re.search(r"Callable\[.*?(\w+)\] expects .*?class: (.*?)\.* Got value: .*class_path='([^']+)'", text):
        return f"{key}: class_path {factory[3]} does not create an {factory[1]} ({factory[2]}); correct it."
    if told := next((line for line in _errors(lines) if not line.startswith(_TYPE_ERRORS)), None):
        return told  # by a class that refused its arguments
    inner = _innermost(message)
    shown = re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", inner, re.MULTILINE)
    expected = list(dict.fromkeys(words for each in shown if (words := _type(each))))
    expected += [
        f"the class_path of a subclass of {kind}" for kind in re.findall(r"Not a valid subclass of (\w+)", inner)
    ]
    if key and expected:
        value = (re.findall(r"Given value: (.*)", inner) or re.findall(r"Got value: (.*)", inner) or ["that"])[0]
        if value == "None":
            if (default := _default_of(key, parsers)) is not None:
                return is_null(key, default)
            return f"{key} must be given, in the configuration file or on the command line."
        few = [word for each in expected if each.startswith("one of ") for word in re.findall(r"'([^']+)'", each)]
        return f"{key} must be {' or '.join(expected)}, not {value}{proposed(value, few)}"
    return text.replace("Parser key ", "")


def _default_of(key: str, parsers: Mapping[str, ArgumentParser]) -> object:
    """Return the default of an option; None if it is required or may be null."""
    defaults = [action.default for parser in parsers.values() for action in options_of(parser) if action.dest == key]
    return next((each for each in defaults if each is not None), None)


def _sibling(key: str, name: str) -> str | None:
    """Suggest the option of the same class of this package that is closest to a misspelt one."""
    place = f"{key.removesuffix('.init_args')}."
    there = {each.rpartition(".")[2]: each for each in names_of_classes() if each.startswith(place)}
    near = [] if name in there else difflib.get_close_matches(name, there, 1, cutoff=0.75)
    return f"did you mean {there[near[0]]}?" if near else None


def _proposal(name: str, parsers: Mapping[str, ArgumentParser]) -> str:
    for elsewhere, instead in _ELSEWHERE.items():
        if name.split("=")[0] == elsewhere or name.startswith(f"{elsewhere}."):
            return f"{instead}."
    options = sorted({a.dest for parser in parsers.values() for a in options_of(parser)} - {*SECTIONS})
    dashes = "--" if name.startswith("--") else ""
    told = meant_by(name.split("=")[0].lstrip("-"), options)
    if told:
        told = told.replace("did you mean ", f"did you mean {dashes}")
        return told if told.endswith("?") else f"{told}."
    return f"pipelite {next(iter(parsers))} --help lists the options."


def _errors(lines: list[str]) -> list[str]:
    """Return the reasons given for the members of a union of types."""
    if not {"Errors:"} <= {*lines}:
        return []
    end = next((number for number, line in enumerate(lines) if line.startswith("Given value")), len(lines))
    return lines[lines.index("Errors:") + 1 : end]


def _innermost(message: str) -> str:
    """Return the part of the tree below the innermost option."""
    lines = message.splitlines()
    last = max((number for number, line in enumerate(lines) if "Parser key" in line), default=0)
    depth = lines[last].index("Parser key") if "Parser key" in lines[last] else -1
    below = itertools.takewhile(lambda line: len(line) - len(line.lstrip(" -")) > depth, lines[last + 1 :])
    return "\n".join([lines[last].rpartition('":')[2], *below])


def _after(lines: list[str], start: str) -> str | None:
    """Return what follows ``start``, or the colon after it, on that line or else the next line."""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(start):
            return (line.removeprefix(start).strip() if start.endswith(":") else line.partition(": ")[2]) or following
    return None


def _type(shown: str) -> str | None:
    """Put into words a type as jsonargparse shows it."""
    if shown.startswith(("path but", "dot import")):  # alternative ways to give a value
        return None
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", shown):
        return f"one of {literal[1]}"
    name = shown.removeprefix("<class '").removesuffix("'>").rsplit(".", 1)[-1]
    return _TYPES.get(name, f"a {name}")


def options_of(parser: ArgumentParser) -> Iterator[Action]:
    """Yield the options of a subcommand that take a value."""
    return (a for a in parser._actions if a.option_strings and a.option_strings[-1].startswith("--") and a.nargs != 0)


def check_config_file(given: str) -> None:
    """Refuse a file that does not hold a configuration.

    Args:
        given: File name as on the command line; anything else is left to jsonargparse, which also takes inline YAML.

    Raises:
        ArgumentError: If the file does not hold options in YAML or JSON.
    """
    path = Path(given).expanduser()
    try:
        if not path.is_file():
            return
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ArgumentError(None, f"the configuration file {given} cannot be read ({reason}); correct it.") from None
    if not isinstance(content, dict):
        raise ArgumentError(
            None, f"the configuration file {given} contains no options; write them in sections such as model and data."
        )


def check_environment(parsers: Mapping[str, ArgumentParser]) -> None:
    """Refuse environment variables that look like options but are not, as they would be silently ignored.

    Raises:
        ConfigurationError: If a variable such as ``PIPELITE_FIT__TRAINER__MAX_STEP`` does not name an option, or the
            configuration file that one names is wrong.
    """
    known = {
        f"{ENV_PREFIX}_{name}__{action.dest.replace('.', '__')}".upper()
        for name, parser in parsers.items()
        for action in options_of(parser)
        if action.dest not in SECTIONS
    }
    for variable in sorted(os.environ):
        if not variable.startswith(f"{ENV_PREFIX}_") or "__" not in variable or variable in known:
            continue
        advice = "correct its name or unset it."
        if parents := [name for name in known if variable.startswith(f"{name}__")]:
            advice = f"set {max(parents, key=len)} as a whole, in JSON."
        elif near := difflib.get_close_matches(variable, known, 1, cutoff=0.75):
            advice = f"did you mean {near[0]}?"
        raise ConfigurationError(f"the environment variable {variable} is not an option; {advice}")
    for name in parsers:
        if file := os.environ.get(f"{ENV_PREFIX}_{name}__CONFIG".upper()):
            try:
                check_config_file(file)
            except ArgumentError as error:
                raise ConfigurationError(str(error)) from None
