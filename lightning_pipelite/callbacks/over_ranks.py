"""Statistics over the layers of all ranks, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the metrics of this optimizer step; the same on every rank."""
    return bool(trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False))


def summarize(values: Mapping[str, Sequence[Tensor]], device: torch.device) -> dict[str, float]:
    """Average, minimum and maximum of some quantities over all ranks. Collective; it waits for the device, once.

    Where several ranks hold the same layers, as in data parallelism, these are as if one did.

    Args:
        values: per quantity the values of this rank's layers, scalars; every rank must name the same quantities in
            the same order, and may have no value.
        device: where a collective operation wants its tensors.

    Returns:
        ``NAME_avg``, ``NAME_min`` and ``NAME_max`` of the quantities of which any rank has values.
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
