"""Finds the Control Adapters in a module and measures them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_pipelite.shared.tf32 import full_precision


@dataclass(frozen=True, eq=False)
class ControlPair:
    """The Control Adapter of one decoder layer, W = Q diag(expm1(S)) Qᵀ.

    Args:
        name: The layer's name.
        q: [hidden, rank].
        s: [rank].
    """

    name: str
    q: nn.Parameter
    s: nn.Parameter


def find_control(module: nn.Module) -> list[ControlPair]:
    """Find the layers that have parameters ``control_Q`` and ``control_S``."""
    return [
        ControlPair(name, layer.control_Q, layer.control_S)
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "control_Q", None), nn.Parameter)
    ]


def orthogonality(pair: ControlPair) -> Tensor:
    """Return ‖QᵀQ - I‖²_F, a float32 scalar: 0 if the columns are orthonormal."""
    q = pair.q.detach().float()
    with full_precision():
        return (q.mT @ q - torch.eye(q.shape[1], device=q.device)).square().sum()


def spectral_norm(pair: ControlPair) -> Tensor:
    """Return ‖W‖₂ = max |expm1(S)| for class +1, as Q is orthogonal; a float64 scalar."""
    return torch.expm1(pair.s.detach().double()).abs().max()
