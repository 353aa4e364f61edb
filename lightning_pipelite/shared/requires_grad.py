"""Parameters that are frozen or thawed while compiled modules are used."""

from __future__ import annotations

from torch import nn


class RequiresGradWatch:
    """Lets compiled modules see that parameters have been frozen or thawed.

    From Python 3.12 on the compiler's guards pass over the tensors of a dictionary that is as it was (seen with torch
    2.11; no setting of its guards by dictionaries' tags turns it off): a parameter that is thawed then goes without a
    gradient, and nobody is told. Remove when ``tests/shared/test_requires_grad.py`` passes without it on Python 3.12.

    Args:
        module: Which holds the parameters, always the same ones.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._watched = [*module.parameters()]
        self._before: list[bool] = []

    def look(self) -> None:
        """Have the modules looked at anew whose parameters have changed; the first time, all of them."""
        now = [parameter.requires_grad for parameter in self._watched]
        if now == self._before:
            return
        before = self._before or [not flag for flag in now]
        changed = {id(p) for p, flag, was in zip(self._watched, now, before, strict=True) if flag != was}
        self._before = now
        for module in self._module.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in changed:
                    module._parameters[name] = None
                    module._parameters[name] = parameter  # in its old place, in a dictionary that has changed
