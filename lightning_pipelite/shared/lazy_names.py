"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_names(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package: torch, transformers and Lightning take seconds, and a file may need none.

    A module of the package may not bear the name of what it gives: importing it would set the package's attribute.

    Args:
        package: The package's ``__name__``.
        modules: For each public name the module of the package that has it.

    Returns:
        The function to call ``__getattr__``.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def import_names(package: ModuleType) -> None:
    """Import all that a package names, so that its classes are among the subclasses of what they are derived from."""
    for name in package.__all__:
        getattr(package, name)
