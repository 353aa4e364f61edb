"""Stops a step whose gradients are missing or not finite before it changes the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_pipelite.shared.async_scalar import AsyncScalar
from lightning_pipelite.shared.finite import in_words, not_finite
from lightning_pipelite.strategy.gradients import GradientNorms


def require_gradients(stage: nn.Module, stage_id: int) -> None:
    """Stop if a trainable parameter has no gradient: DeepSpeed would fill in zeros and carry on.

    Raises:
        RuntimeError: Naming the stage and the parameters without a gradient in the first step.
    """
    missing = [name for name, p in stage.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RuntimeError(
            f"stage {stage_id}: no gradient reached {', '.join(missing[:3])}{more} in the first step; "
            "freeze what the loss does not depend on (requires_grad=False)"
        )


class GradientCheck:
    """Checks the norms of a step's gradients right before the optimizer changes the weights.

    A loss can be finite while its gradients are not. Clipping by such a norm makes all gradients NaN or zero, and the
    weights NaN. The norms are those used for logging and clipping anyway, over all stages, so every rank of a pipeline
    sees the same values and stops with the same message.

    Args:
        stage: This rank's stage.
        group: The process group of the pipeline, or None for a single stage.
    """

    def __init__(self, stage: nn.Module, group: Any) -> None:
        self._stage, self._group = stage, group

    def require_finite(self, step: int, norms: GradientNorms, clipped: Tensor) -> None:
        """Stop if the gradients are not finite; in that case collective over the pipeline.

        Args:
            step: The number of the step, counted from 1.
            norms: Norms of the gradients as they are after the hooks that run before the optimizer's step.
            clipped: The total norm after clipping.

        Raises:
            RuntimeError: Naming the step, and the parameters of all stages whose gradients are not finite.
        """
        # On a GPU the host waits here, as late as possible, and only for what has been launched before.
        before, after = AsyncScalar(torch.stack([norms.total, clipped.to(norms.total)])).value()
        if math.isfinite(before) and math.isfinite(after):
            return
        if math.isfinite(before):
            gradients = {name: p.grad for name, p in self._stage.named_parameters() if p.grad is not None}
            found, what = not_finite(gradients), f"clipping has made the norm of the gradients {after}"
        else:
            finite = norms.each.isfinite().tolist()
            bad = {id(p) for p, is_finite in zip(norms.parameters, finite, strict=True) if not is_finite}
            found = [name for name, p in self._stage.named_parameters() if id(p) in bad]
            what = f"the loss is finite, but the norm of the gradients is {before}"
        raise RuntimeError(
            f"step {step}: {what}, due to those of {in_words(self._by_stage(found))}; training stops before the "
            "weights are changed"
        )

    def _by_stage(self, mine: list[str]) -> list[list[str]]:
        if self._group is None:
            return [mine]
        everyones = [mine] * dist.get_world_size(self._group)
        dist.all_gather_object(everyones, mine, group=self._group)
        return everyones
