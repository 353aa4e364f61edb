"""What is checked in each process before it starts any other, and what can be had by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_pipelite.checkpoint.find import find_checkpoint
from lightning_pipelite.shared.protocol import Loss, PipelineLayers
from lightning_pipelite.strategy.checkpoint_checks import check_checkpoint_callbacks
from lightning_pipelite.strategy.checks import check_trainer
from lightning_pipelite.strategy.empty_logs import EmptyLogs
from lightning_pipelite.strategy.former_results import refuse_former_results
from lightning_pipelite.strategy.layers import hand_out_layers


def check_launch(
    trainer: pl.Trainer,
    arguments: dict[str, Any],
    *,
    cut: Callable[[PipelineLayers], list[int]],
    starts_the_job: bool,
) -> tuple[tuple[PipelineLayers, Loss] | None, EmptyLogs | None]:
    """Refuse what cannot work; resolve ``ckpt_path="last"``.

    Args:
        trainer: What is asked to run.
        arguments: Of the Trainer's method by name; ``ckpt_path`` is changed.
        cut: Cuts the layers into stages, or into their pieces.
        starts_the_job: Whether this is the first rank, which looks after the job's files.

    Returns:
        The layers and the loss, unless hooks of the module may make them; and on the first rank the log directories
        that the run is about to make.

    Raises:
        ConfigurationError: For what cannot work.
    """
    module = arguments.get("model") or trainer.lightning_module
    check_trainer(trainer, module)
    check_checkpoint_callbacks(trainer)
    handed = None
    if not (is_overridden("setup", module) or is_overridden("configure_model", module)):  # they may make the layers
        handed = hand_out_layers(module)
        cut(handed[0])
    arguments["ckpt_path"] = find_checkpoint(trainer, arguments.get("ckpt_path"), checks=starts_the_job)
    if not starts_the_job:
        return handed, None
    if trainer.state.fn == TrainerFn.FITTING:
        refuse_former_results(trainer, arguments.get("ckpt_path"))
    return handed, EmptyLogs(trainer)
