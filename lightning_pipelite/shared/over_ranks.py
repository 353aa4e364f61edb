"""When ranks log, and the collective operations that they use for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def logs_now(trainer: pl.Trainer) -> bool:
    """Tell whether Lightning logs the metrics of this optimizer step; the same on every rank."""
    return bool(trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False))


class LoggedSteps:
    """Tells in ``on_train_batch_end`` whether a step that Lightning logs has ended; the same on every rank.

    Args:
        trainer: The Trainer, at the start of training.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._step = trainer.global_step
        self._logged = 0

    def ended(self, trainer: pl.Trainer) -> bool:
        """Tell whether such a step has ended since the last call. Must be called after every batch."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        logged = stepped and logs_now(trainer)
        self._logged += logged
        return logged

    def every(self, times: int) -> bool:
        """Tell whether the step is the first that was logged, or a multiple of ``times`` logged steps later."""
        return self._logged % times == 1


def gathered(own: T) -> list[T]:
    """Return every rank's value, by rank. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    everyones = [own] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return everyones


def summarize(values: Mapping[str, Sequence[Tensor]], device: torch.device) -> dict[str, float]:
    """Return average, minimum and maximum of some quantities over all ranks. Collective; synchronises the host once.

    Where several ranks hold the same layers, as in data parallelism, the results are as if only one did.

    Args:
        values: For each quantity the values of this rank's layers, scalars, possibly none; every rank must name the
            same quantities in the same order.
        device: Where collective operations require their tensors.

    Returns:
        ``NAME_avg``, ``NAME_min`` and ``NAME_max`` of each quantity for which any rank has values.
    """
    sums = torch.zeros(len(values), 2, dtype=torch.float64, device=device)
    extremes = torch.full((len(values), 2), -torch.inf, dtype=torch.float64, device=device)
    for row, own in enumerate(values.values()):
        if own:
            stacked = torch.stack(list(own)).double()
            sums[row] = torch.stack([stacked.sum(), stacked.new_full((), len(own))])
            extremes[row] = torch.stack([(-stacked).max(), stacked.max()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    summary: dict[str, float] = {}
    rows = torch.cat([sums, extremes], dim=1).tolist()
    for name, (total, count, negative_minimum, maximum) in zip(values, rows, strict=True):
        if count:
            summary |= {f"{name}_avg": total / count, f"{name}_min": -negative_minimum, f"{name}_max": maximum}
    return summary
