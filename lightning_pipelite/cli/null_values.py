"""Refusal of null for options that cannot be null; jsonargparse accepts it for any option."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from lightning_pipelite.errors import ConfigurationError


def refuse_nulls(section: str, made: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse null for options that have another default and do not take it; also in the classes that options name.

    Args:
        section: Section of the options, for the message.
        made: Class whose parameters they are.
        given: Their values.

    Raises:
        ConfigurationError: If one is null; the message names it.
    """
    hints = _hints(made)
    for name, parameter in inspect.signature(made).parameters.items():
        takes = hints.get(name, Any)
        may_be = takes is Any or NoneType in get_args(takes) or parameter.default in (None, inspect.Parameter.empty)
        if name in given and given[name] is None and not may_be:
            raise ConfigurationError(is_null(f"{section}.{name}", parameter.default))
    for name, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            _refuse_within(f"{section}.{name}", each)


def is_null(name: str, default: object) -> str:
    """Return the message that an option is null, with the default that it would otherwise have."""
    return f"{name} cannot be null: leave it out for the default, {str(default).lower()}, or give a value."


def _refuse_within(name: str, given: Any) -> None:
    """Refuse nulls among the arguments of a class, if the class can be imported."""
    if isinstance(given, Namespace):  # an element of a list
        given = given.as_dict()
    path, options = (given.get(key) if isinstance(given, dict) else None for key in ("class_path", "init_args"))
    if not (isinstance(path, str) and isinstance(options, dict)):
        return
    module, _, kind = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), kind)
        inspect.signature(made)
    except (ImportError, AttributeError, TypeError, ValueError):  # reported when it is instantiated
        return
    refuse_nulls(f"{name}.{kind}" if name == "trainer.callbacks" else name, made, options)


def _hints(made: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except (NameError, TypeError, AttributeError):  # for names imported under TYPE_CHECKING only
        return {}
