"""Optimizer groups that have no parameters on a stage."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class EmptyGroups:
    """Hides groups without parameters from an optimizer while it changes the weights.

    Every stage has all groups, some of them empty. optimi (0.3.3) fails on an empty group with ``foreach``, and
    otherwise fills in its options as if its parameters were on a GPU.

    Args:
        optimizer: The optimizer, before others register hooks that run after its steps: those must see all groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._shown = optimizer.param_groups  # changed in place, since others hold this list too
        self._all: list[dict[str, Any]] = []
        optimizer.register_step_post_hook(self._show)

    def hide(self) -> None:
        """Hide empty groups; to be called after the closure, whose hooks see all groups, and before the update."""
        if not all(group["params"] for group in self._shown):
            self._all = [*self._shown]
            self._shown[:] = [group for group in self._all if group["params"]]

    def _show(self, *_: Any) -> None:
        if self._all:
            self._shown[:], self._all = self._all, []
