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
    """Stop if something that should train does not: DeepSpeed would fill in zeros and go on.

    Raises:
        RuntimeError: Naming the stage and what has no gradient after its first step.
    """
    missing = [name for name, p in stage.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RuntimeError(
            f"stage {stage_id}: no gradient reached {', '.join(missing[:3])}{more} in the first step; "
            "freeze what the loss does not depend on (requires_grad=False)"
        )


class GradientCheck:
    """Looks at the norms of a step's gradients, the last thing before the optimizer changes the weights.

    A loss can be finite while its gradients are not. Clipped by such a norm they all become NaN or zero, and the
    weights NaN. The norms are those that are logged and clipped by anyway, over all stages, so every rank of a
    pipeline sees the same and stops with the same sentence.

    Args:
        stage: This rank's stage.
        group: The process group of the pipeline, or None for a single stage.
    """

    def __init__(self, stage: nn.Module, group: Any) -> None:
        self._stage, self._group = stage, group

    def require_finite(self, step: int, norms: GradientNorms, clipped: Tensor) -> None:
        """Stop if the gradients are not finite; collective over the pipeline in that case.

        Args:
            step: Which one it is, from 1 on.
            norms: Of the gradients, as the hooks before the optimizer's step have left them.
            clipped: The total norm after clipping.

        Raises:
            RuntimeError: Naming the step, and the parameters of all stages whose gradients are not finite.
        """
        # On a GPU the host waits here, as late as it can be: for what has been launched before, and for no more.
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
            f"step {step}: {what}, by those of {in_words(self._by_stage(found))}; training stops before the weights "
            "are changed"
        )

    def _by_stage(self, mine: list[str]) -> list[list[str]]:
        if self._group is None:
            return [mine]
        everyones = [mine] * dist.get_world_size(self._group)
        dist.all_gather_object(everyones, mine, group=self._group)
        return everyones
