"""The gradient norm of a model whose parameters are spread over stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def scale_gradients(parameters: Iterable[Tensor], factor: float | Tensor) -> None:
    """Multiply the gradients by a number, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def global_norm(parameters: Iterable[Tensor], group: Any, device: torch.device) -> Tensor:
    """The 2-norm of the gradients over all stages, as one vector, in float32.

    DeepSpeed's own norm counts the first stage alone, and fails on a stage without trainable parameters. Collective
    over the group.

    Args:
        parameters: this stage's, each tied one in one stage only.
        group: the process group of the pipeline, or None for a single stage.
        device: where the result lies, a scalar.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    square = torch.zeros((), device=device)
    if gradients:
        # Norms of bf16 gradients are accumulated in float32, not in their own type.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        square = torch.stack([norm.to(device) for norm in norms]).square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of this norm with, as in :func:`torch.nn.utils.clip_grad_norm_`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
