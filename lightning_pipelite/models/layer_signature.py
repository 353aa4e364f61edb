"""Identifies decoder layers of one kind, so that a finding about one holds for all of them."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn


def layer_signature(layer: nn.Module) -> Hashable:
    """Return a key that is equal for decoder layers with the same modules, shapes and options."""
    plain = (int, float, str, bool, type(None))
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)),
            tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_" and "idx" not in k),
        )
        for name, module in layer.named_modules()
    )
