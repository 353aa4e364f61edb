"""What the strategy refuses, each with a message of one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.known_callbacks import check_callbacks, check_monitors
from lightning_pipelite.strategy.module_hooks import check_hooks, check_plugins
from lightning_pipelite.strategy.refused_options import refuse_options


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what a Trainer can do under other strategies but not in a pipeline, as far as it applies to this call."""
    if trainer.state.fn == TrainerFn.PREDICTING:
        raise ConfigurationError(
            "PipeLiteStrategy does not support Trainer.predict; to predict, save the trained weights and load them "
            "without the strategy (those of PipeLiteModule with transformers or PEFT), or use another strategy."
        )
    check_options(trainer, module)
    rank_zero_info(
        f"PipeLiteStrategy runs what {type(module).__name__}.pipeline_layers() returns; training_step, "
        "validation_step and test_step are not called."
    )


def check_options(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse Trainer options, plugins, callbacks and module methods that would not do what they say."""
    refuse_options(precision=trainer.precision)
    if not module.automatic_optimization:
        raise ConfigurationError("PipeLiteStrategy needs automatic_optimization=True.")
    refuse_options(sync_batchnorm=trainer._accelerator_connector._layer_sync is not None)
    if (device := trainer.strategy.root_device.type) not in ("cpu", "cuda"):
        raise ConfigurationError(f"Trainer(accelerator=...) gives {device} devices; PipeLiteStrategy needs gpu or cpu.")
    if trainer._model_registry:
        raise ConfigurationError(
            "Trainer(model_registry=...) is not supported by PipeLiteStrategy, whose checkpoints are directories; "
            "leave it out."
        )
    if math.isnan(trainer.gradient_clip_val or 0.0):
        raise ConfigurationError("trainer.gradient_clip_val is NaN; set it to a positive number, or leave it out.")
    if getattr(trainer, "_val_check_time_interval", None) is not None and trainer.world_size > 1:
        raise ConfigurationError(
            "trainer.val_check_interval as a time can only be used with a single process: each rank would follow its "
            "own clock, but an evaluation needs all of them; set it to a number of micro-batches, or use "
            "lightning_pipelite.callbacks.EvalSchedule."
        )
    check_plugins(trainer)
    check_hooks(module)
    check_callbacks(trainer)
    check_monitors(trainer, module)


def check_optimizers(optimizers: Sequence[Optimizer], module: pl.LightningModule, mine: Iterable[Tensor]) -> None:
    """Refuse optimizers that would leave something untrained.

    Args:
        optimizers: The module's optimizers.
        module: The module, for the names of its parameters.
        mine: The parameters of this rank's stage.
    """
    if len(optimizers) != 1:
        raise ConfigurationError(f"PipeLiteStrategy needs one optimizer, not {len(optimizers)}.")
    if isinstance(optimizers[0], _MockOptimizer):
        raise ConfigurationError(
            f"{type(module).__name__}.configure_optimizers() returned None, so nothing would be trained; return an "
            "optimizer, or call Trainer.validate instead of Trainer.fit."
        )
    if isinstance(optimizers[0], torch.optim.LBFGS):
        raise ConfigurationError("LBFGS needs all parameters in one process; use another optimizer.")
    here = {id(p) for p in mine}
    names = {id(p): name for name, p in module.named_parameters()}
    for group in optimizers[0].param_groups:
        # Other stages' layers are on the meta device here. A parameter neither there nor in this stage is in none.
        stray = [p for p in group["params"] if id(p) not in here and p.requires_grad and not p.is_meta]
        if stray:
            raise ConfigurationError(
                f"the optimizer was given {names.get(id(stray[0]), 'a parameter')}, which is in none of the layers "
                "that pipeline_layers() returns and would never be trained; move it into a layer, or freeze it."
            )


def check_trainable(mine: Iterable[Tensor], device: torch.device) -> None:
    """Refuse a job in which no stage has anything to train. Collective.

    Args:
        mine: The parameters of this rank's stage.
        device: The device of the process group's tensors.
    """
    trainable = torch.tensor(float(sum(p.requires_grad for p in mine)), device=device)
    dist.all_reduce(trainable)
    if trainable.item() == 0:
        raise ConfigurationError("no parameter of any stage requires a gradient: there is nothing to train.")


def check_loaders(loader: Any, module: pl.LightningModule) -> None:
    """Refuse data loaders that run side by side: the batches of two would be taken for inputs and targets.

    Args:
        loader: The loop's CombinedLoader.
        module: The module, whose hooks may turn what they yield into pairs.
    """
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners = (module, getattr(module.trainer, "datamodule", None))
    if loader._mode == "sequential" or len(loader.flattened) == 1:
        return
    if not any(is_overridden(hook, owner) for hook in hooks for owner in owners):
        raise ConfigurationError(
            f"{len(loader.flattened)} data loaders are iterated in parallel; PipeLiteStrategy needs one that yields "
            "pairs (inputs, targets), or a module whose on_after_batch_transfer() makes such pairs of their batches."
        )


def checked_pair(batch: Any) -> tuple[Any, Any]:
    """Return a micro-batch as a pair; refuse anything else."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ConfigurationError(
            f"PipeLiteStrategy needs micro-batches that are pairs (inputs, targets), not {type(batch).__name__}; "
            "convert them in the module's on_after_batch_transfer()."
        )
    return batch[0], batch[1]
