"""SIGTERM, without what Lightning does about it in every micro-batch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException


class SigtermNotice:
    """Notes the signal; before the next step all ranks leave together. Outside of steps the noting rank leaves alone.

    Takes the place of two things in Lightning (2.6). Its handler broadcasts at once, amid whatever the ranks are doing,
    which then never ends. And in every micro-batch it broadcasts a tensor on the GPU and reads it, which makes the host
    wait for all that has been launched; here it is a number on the host, over a process group of its own, once a step.
    Building it is collective. Remove it when Lightning leaves this to its strategies.

    Args:
        trainer: its handler is not registered yet.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._noted = False
        self._group: Any = dist.new_group(backend="gloo") if trainer.world_size > 1 else None
        trainer._signal_connector._sigterm_notifier_fn = self._note  # type: ignore[assignment,method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._agree  # type: ignore[method-assign]

    def _note(self, signum: int, frame: Any) -> None:
        self._noted = True
        if self._group is None or not self._trainer.training:  # Lightning's loops look at its own flag
            self._trainer._signal_connector.received_sigterm = True

    def _agree(self) -> None:
        """Called before each micro-batch is fetched, if there are several ranks."""
        loop = self._trainer.fit_loop.epoch_loop
        if loop.batch_progress.current.ready % self._trainer.accumulate_grad_batches:
            return  # in the middle of a step
        noted = torch.tensor(int(self._noted))
        dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        if noted.item():
            raise SIGTERMException
