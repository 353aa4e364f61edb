"""The step that keeps a Control Adapter's directions orthogonal."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lightning_pipelite.shared.tf32 import full_precision


def keep_orthogonal(directions: Sequence[Tensor], gamma: float) -> None:
    """Set Q to Q - gamma · Q(QᵀQ - I) for every Q [hidden, rank], in float32 and in place.

    With gamma = 0.5 this is a Newton-Schulz step to the nearest matrix with orthonormal columns (Björck and Bowie
    1971, SIAM J. Numer. Anal. 8(2)), which squares the residual of QᵀQ; a smaller gamma goes part of the way.
    """
    alike: dict[Hashable, list[Tensor]] = {}
    for each in directions:
        alike.setdefault((each.shape, each.dtype, each.device), []).append(each.detach())
    with torch.no_grad(), full_precision():
        for same in alike.values():
            q = torch.stack(same).float()
            residual = q.mT @ q - torch.eye(q.shape[2], device=q.device)
            torch._foreach_copy_(same, list(torch.baddbmm(q, q, residual, alpha=-gamma).unbind()))
