"""What each process checks, and already prepares, before it starts any others."""

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
    """Refuse what cannot work, and resolve ``ckpt_path="last"``.

    Args:
        trainer: The Trainer that is about to run.
        arguments: The arguments of the Trainer's method by name; ``ckpt_path`` is changed in place.
        cut: Cuts the layers into stages, or into pieces of stages.
        starts_the_job: Whether this is the first rank, which manages the job's files.

    Returns:
        The layers and the loss, or None if hooks of the module may create them; and on the first rank the log
        directories that the run is about to create, or None on the others.

    Raises:
        ConfigurationError: If the run cannot work.
    """
    module = arguments.get("model") or trainer.lightning_module
    check_trainer(trainer, module)
    check_checkpoint_callbacks(trainer)
    handed = None
    if not (is_overridden("setup", module) or is_overridden("configure_model", module)):  # these may create the layers
        handed = hand_out_layers(module)
        cut(handed[0])
    arguments["ckpt_path"] = find_checkpoint(trainer, arguments.get("ckpt_path"), checks=starts_the_job)
    if not starts_the_job:
        return handed, None
    if trainer.state.fn == TrainerFn.FITTING:
        refuse_former_results(trainer, arguments.get("ckpt_path"))
    return handed, EmptyLogs(trainer)
