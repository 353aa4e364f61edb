"""Parameters that are frozen or unfrozen while compiled modules are in use."""

from __future__ import annotations

from torch import nn


class RequiresGradWatch:
    """Makes compiled modules notice that parameters have been frozen or unfrozen.

    From Python 3.12 on, the compiler's guards skip the tensors of a dictionary that has not changed (seen with torch
    2.11; no setting of its dict-tag guards turns this off): a parameter that is then unfrozen gets no gradient, without
    any warning. Remove when ``tests/shared/test_requires_grad.py`` passes without it on Python 3.12.

    Args:
        module: The module with the parameters, which must not be replaced later.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._watched = [*module.parameters()]
        self._before: list[bool] = []

    def look(self) -> None:
        """Make guards check the modules whose parameters have changed since the last call; the first time, all."""
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
                    module._parameters[name] = parameter  # in its old place, but the dictionary has changed
