"""SIGTERM and Ctrl-C, without Lightning's handling, which interferes with whatever the ranks are doing."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_pipelite.shared.interrupt import heed_first_interrupt, name_of
from lightning_pipelite.strategy.agreement import Agreement


class SigtermNotice:
    """Notes the signal; all ranks leave together before the next step. Outside a fit, that rank leaves alone.

    It replaces three things in Lightning (2.6). Lightning's SIGTERM handler broadcasts at once, in the middle of
    whatever the ranks are doing, which then never ends. For every micro-batch it broadcasts a tensor on the GPU and
    reads it, which makes the host wait for all kernels launched so far; here it is a number on the host, once a step.
    And Ctrl-C, which a terminal sends to all ranks, interrupts each of them wherever it is; here it is handled like
    SIGTERM during training. Remove this class when Lightning leaves it to its strategies.

    Args:
        trainer: The Trainer, before it registers its handlers.
        agreement: The agreement of all ranks.
    """

    def __init__(self, trainer: pl.Trainer, agreement: Agreement) -> None:
        self._trainer, self._agreement = trainer, agreement
        self._noted = 0  # the number of the signal
        self._process = os.getpid()
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = self._note
        connector.register_signal_handlers = self._register
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._agree  # type: ignore[method-assign]

    def release(self) -> None:
        """Restore what the Trainer had before."""
        for part, name in (
            (self._trainer._signal_connector, "_sigterm_notifier_fn"),
            (self._trainer._signal_connector, "register_signal_handlers"),
            (self._trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
        ):
            part.__dict__.pop(name, None)

    def completes(self, exception: SIGTERMException) -> None:
        """Set the exception's exit status to the signal's, and report what has happened, unless a callback has."""
        if exception.code is None:
            signum = self._noted or signal.SIGTERM
            exception.code = 128 + signum
            self._trainer.print(
                f"{name_of(signum)}: training ends after step {self._trainer.global_step}; the TimedCheckpoint "
                "callback would have saved a checkpoint."
            )

    def _register(self) -> None:
        """Note Ctrl-C too, until Lightning restores the previous handlers."""
        connector: Any = self._trainer._signal_connector
        type(connector).register_signal_handlers(connector)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader worker, which its rank still needs
        if self._trainer.state.fn != TrainerFn.FITTING or self._trainer.sanity_checking:
            raise KeyboardInterrupt  # there is nothing to save
        self._note(signum, frame)
        heed_first_interrupt()

    def _note(self, signum: int, frame: Any) -> None:
        self._noted = signum
        fitting = self._trainer.state.fn == TrainerFn.FITTING and not self._trainer.sanity_checking
        if self._trainer.world_size == 1 or not fitting:  # Lightning's loops check its own flag
            self._trainer._signal_connector.received_sigterm = True

    def _agree(self) -> None:
        """Agree with the other ranks, if any, before the first micro-batch of a step is fetched."""
        loop = self._trainer.fit_loop.epoch_loop
        if loop.batch_progress.current.ready % self._trainer.accumulate_grad_batches:
            return  # in the middle of a step
        place = f"epoch {self._trainer.current_epoch}, before micro-batch {loop.batch_progress.current.ready + 1}"
        self._noted = self._agreement.tell(f"{place} of {self._trainer.num_training_batches}", noted=self._noted)
        if self._noted:
            raise SIGTERMException
