"""Names of a package that are imported on first access."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_names(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package: importing torch, transformers and Lightning takes seconds, often in vain.

    A module of the package must not have the name that it provides: importing it would set the package's attribute.

    Args:
        package: The package's ``__name__``.
        modules: For each public name, the module of the package that has it.

    Returns:
        The function to assign to ``__getattr__``.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def import_names(package: ModuleType) -> None:
    """Import everything in a package's ``__all__``, so that its classes are among the subclasses of their bases."""
    for name in package.__all__:
        getattr(package, name)
