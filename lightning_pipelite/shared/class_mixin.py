"""Changes what a module does, in place, by mixing a class into its own."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


def mix_in(module: nn.Module, mixin: type) -> Any:
    """Make ``module`` an instance of ``mixin`` and of the class that it was of; return it.

    Modules of one class stay of one class, so that ``torch.compile`` can compile one for all.
    """
    if not isinstance(module, mixin):  # as it is in a second run
        kind: Any = type(module)
        module.__class__ = _mixed(kind, mixin)
    return module


def take_out(module: nn.Module, mixin: type) -> None:
    """Undo :func:`mix_in`; where another class has been mixed in since, the module stays what it is."""
    if type(module) is _mixed(plain_class(module, mixin), mixin):
        module.__class__ = plain_class(module, mixin)


def plain_class(module: nn.Module, mixin: type) -> Any:
    """The class that a module had before ``mixin`` was mixed into it."""
    bases = type(module).__bases__
    return bases[1] if len(bases) == 2 and bases[0] is mixin else type(module)


@cache
def _mixed(kind: type[nn.Module], mixin: type) -> Any:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
