"""The gradient norm of a model whose parameters are spread over stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def scale_gradients(parameters: Iterable[Tensor], factor: float | Tensor) -> None:
    """Multiply the gradients by a number, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


@dataclass(frozen=True)
class GradientNorms:
    """The 2-norms of gradients.

    Attributes:
        parameters: Those of this stage that have a gradient and are counted here.
        each: The norm of each of them, float32.
        total: That of all gradients of all stages as one vector, a float32 scalar.
    """

    parameters: list[Tensor]
    each: Tensor
    total: Tensor


def gradient_norms(parameters: Iterable[Tensor], group: Any, device: torch.device) -> GradientNorms:
    """Return the 2-norms of the gradients over all stages.

    DeepSpeed's own norm counts the first stage alone, and fails on a stage without trainable parameters. Collective
    over the group.

    Args:
        parameters: This stage's, each tied one in one stage only.
        group: The process group of the pipeline, or None for a single stage.
        device: Where the results lie.
    """
    counted = [p for p in parameters if p.grad is not None]
    each = torch.zeros(0, device=device)
    if counted:
        # Norms of bf16 gradients are accumulated in float32, not in their own type.
        gradients = [p.grad for p in counted if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        each = torch.stack([norm.to(device) for norm in norms])
    square = each.double().square().sum()  # so that it is finite if each is
    if group is not None:
        dist.all_reduce(square, group=group)
    return GradientNorms(counted, each, square.sqrt().float())


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what to multiply gradients of this norm with, as in :func:`torch.nn.utils.clip_grad_norm_`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
