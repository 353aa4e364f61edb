"""The options given in files and on the command line, as far as they are certain before torch is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_pipelite.cli.option_words import content_of, options_of
from lightning_pipelite.cli.sections import SECTIONS
from lightning_pipelite.shared.verbosity import VARIABLE

_WITH_CLASS = ("trainer.strategy", "model.adapter", "model.optimizer")
"""Options whose value is a class with options of its own."""
_KNOWN_PACKAGES = {"lightning", "lightning_pipelite", "torch", "optimi"}
STRATEGY = "lightning_pipelite.PipeLiteStrategy"
"""The default strategy."""
NULLS = (None, "null", "Null", "NULL", "~")


@dataclass(frozen=True)
class ClassOptions:
    """A class and its arguments.

    Attributes:
        class_path: Import path or short name, as given.
        init_args: Arguments by name.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Given:
    """Options as given: values from files as they are there, those from the command line as text.

    Attributes:
        values: Values by the option's dotted name, such as ``trainer.devices``; for a class, a :class:`ClassOptions`.
            Options given in a way that is not read here are left out.
        unread: The names of the options that are left out.
    """

    values: dict[str, Any] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)

    def section(self, name: str) -> dict[str, Any]:
        """Return the plain values of a section, by their names within it."""
        return {
            key.partition(".")[2]: value
            for key, value in self.values.items()
            if key.startswith(f"{name}.") and not isinstance(value, ClassOptions) and value not in NULLS
        }

    def with_class(self, name: str) -> ClassOptions | None:
        """Return the class given for an option; None if it is not read here."""
        found = self.values.get(name)
        return found if isinstance(found, ClassOptions) else None

    @property
    def callbacks(self) -> list[ClassOptions] | None:
        """The callbacks; None if they are not all read here."""
        listed = self.values.get("trainer.callbacks")
        if "trainer.callbacks" in self.unread or not isinstance(listed, (list, type(None))):
            return None
        made = [_class_options(each) for each in listed or ()]
        return None if None in made else [each for each in made if each is not None]

    @property
    def runs_others_code(self) -> bool:
        """Whether the user's own classes may be imported, which may register anything."""
        named = [
            [value.class_path, value.init_args] if isinstance(value, ClassOptions) else value
            for name, value in self.values.items()
            if name.startswith(("trainer.", "model.")) and name != "model.model_dir"
        ]
        packages = {
            text.split(".")[0] for text in _texts(named) if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text)
        }
        return bool(self.unread) or not packages <= _KNOWN_PACKAGES

    def put(self, name: str, value: Any) -> None:
        """Add an option that comes after all previous ones, and so overrides them."""
        first, *rest = [part for part in name.replace("+", "").split(".") if part != "init_args"] or [""]
        option = ".".join([first, *rest[:1]])
        below = rest[1:]
        is_class = option in _WITH_CLASS
        if below == ["class_path"] and is_class:
            below = []
        here = self.values.get(option)
        if option in self.unread:
            return
        if "+" in name or (isinstance(value, str) and "${" in value):
            self._forget(option)
        elif not below and not is_class:
            self.values[option] = value
        elif not below and value in NULLS:
            if here is not None:
                self._forget(option)
        elif not below and here is None:
            made = _class_options(value)
            if made is None:
                self._forget(option)
            else:
                self.values[option] = made
        elif len(below) == 1 and option == "trainer.strategy" and here is None:
            self.values[option] = ClassOptions(STRATEGY, {below[0]: value})
        elif len(below) == 1 and isinstance(here, ClassOptions) and here.class_path != "pipelite":
            here.init_args[below[0]] = value
        else:
            self._forget(option)

    def _forget(self, option: str) -> None:
        self.values.pop(option, None)
        self.unread.add(option)


def given_options(words: Sequence[str]) -> Given | None:
    """Read the given options.

    Args:
        words: The arguments after the subcommand.

    Returns:
        The options; None if more may be given elsewhere, in the environment or in files that are not read here.
    """
    if any(name.startswith(("PIPELITE_", "PL_")) and name != VARIABLE for name in os.environ):
        return None
    given = Given()
    for name, value in options_of(words):
        if name in ("c", "config"):
            content = content_of(value)
            if not content or any(each in SECTIONS and not isinstance(content[each], dict) for each in content):
                return None
            for section, options in content.items():
                if section in SECTIONS:
                    for key, each in options.items():
                        given.put(f"{section}.{key}", each)
                else:
                    given.put(section, options)
        elif name in SECTIONS or name.endswith("help"):
            return None
        elif value is not None and not re.match(r"--?[A-Za-z]", value):
            given.put(name, value)
    return given


def _class_options(value: Any) -> ClassOptions | None:
    """Read a class given by its name or with its options; None if it is given in a way that is not read here."""
    if isinstance(value, str):
        is_name = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value) and not Path(value).exists()
        return ClassOptions(value) if is_name and not value.endswith((".yaml", ".yml", ".json")) else None
    if not isinstance(value, dict) or not {*value} <= {"class_path", "init_args"}:
        return None
    path, options = value.get("class_path"), value.get("init_args") or {}
    return ClassOptions(path, {**options}) if isinstance(path, str) and isinstance(options, dict) else None


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in nested options."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(each)
