"""Gradient norms of a model whose parameters are spread over stages."""

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
        parameters: This stage's parameters that have a gradient and are counted here.
        each: The norm of each of their gradients, float32.
        total: The norm of all gradients of all stages as one vector, a float32 scalar.
    """

    parameters: list[Tensor]
    each: Tensor
    total: Tensor


def gradient_norms(parameters: Iterable[Tensor], group: Any, device: torch.device) -> GradientNorms:
    """Return the 2-norms of the gradients over all stages. Collective over the group.

    DeepSpeed's own norm covers the first stage only, and fails on a stage without trainable parameters.

    Args:
        parameters: This stage's parameters; a tied one is passed on one stage only.
        group: The process group of the pipeline, or None for a single stage.
        device: The device of the results.
    """
    counted = [p for p in parameters if p.grad is not None]
    each = torch.zeros(0, device=device)
    if counted:
        # Norms of bf16 gradients are accumulated in float32, not in bf16.
        gradients = [p.grad for p in counted if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        each = torch.stack([norm.to(device) for norm in norms])
    square = each.double().square().sum()  # in float64, so that it is finite if each is
    if group is not None:
        dist.all_reduce(square, group=group)
    return GradientNorms(counted, each, square.sqrt().float())


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor for gradients of this norm, as in :func:`torch.nn.utils.clip_grad_norm_`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
