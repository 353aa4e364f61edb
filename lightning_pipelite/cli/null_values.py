"""Options that are given as null and have no such value, which jsonargparse takes for any option."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

from lightning_pipelite.errors import ConfigurationError


def refuse_nulls(section: str, made: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse null for what has a default that is another, and no use for it.

    Args:
        section: Of the options, for the message.
        made: The class that they are the parameters of.
        given: Their values.

    Raises:
        ConfigurationError: If one is null; the sentence names it.
    """
    hints = get_type_hints(made.__init__)
    for name, parameter in inspect.signature(made).parameters.items():
        takes = hints.get(name, Any)
        may_be = takes is Any or NoneType in get_args(takes)
        if name in given and given[name] is None and not may_be and parameter.default is not inspect.Parameter.empty:
            raise ConfigurationError(
                f"{section}.{name} is null: leave it out for {str(parameter.default).lower()}, or give a value."
            )
