"""What was predicted against what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_pipelite.plan.stages import StageMemory

STEPS = 2  # after the first one the optimizer's state is there


class PredictedMemory(pl.Callback):
    """Prints, after the first steps on GPUs, what each stage was predicted to take and what it took.

    What is compared is the most that torch allocated (``torch.cuda.max_memory_allocated``) after the first step.

    Args:
        stages: the plan.
    """

    def __init__(self, stages: Sequence[StageMemory]) -> None:
        self._stages = stages
        self._measured = False

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        device = pl_module.device
        if self._measured or device.type != "cuda" or trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step < STEPS:
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._measured = True
        stage_id = getattr(trainer.strategy, "stage_id", 0)
        measured: list[Any] = [(stage_id, torch.cuda.max_memory_allocated(device))]
        if dist.is_initialized():
            mine = measured[0]
            measured = [None] * dist.get_world_size()
            dist.all_gather_object(measured, mine)
        if trainer.is_global_zero:
            print("\n".join(self.lines(measured)), flush=True)

    def lines(self, measured: Sequence[tuple[int, int]]) -> list[str]:
        """Return a line a stage.

        Args:
            measured: of each rank, its stage and its bytes.
        """
        lines = []
        for number, stage in enumerate(self._stages):
            most = max((size for stage_id, size in measured if stage_id == number), default=0)
            off = f" ({stage.peak / most - 1:+.0%})" if most else ""
            predicted, found = (f"{size / 2**30:.2f} GiB" for size in (stage.peak, most))
            lines.append(f"memory of stage {number}: predicted {predicted}, measured {found}{off}")
        return lines
