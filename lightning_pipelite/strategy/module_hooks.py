"""Which hooks of a LightningModule the strategy runs, and which plugins of the Trainer it uses."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_pipelite.errors import ConfigurationError

NOT_CALLED = {
    "backward": "the engine runs each stage's backward pass; change the loss that pipeline_layers() returns",
    "manual_backward": "the engine runs each stage's backward pass; change the loss that pipeline_layers() returns",
    "state_dict": "each stage saves its own weights by name; save anything else with on_save_checkpoint",
    "load_state_dict": "each stage loads its own weights by name; load anything else with on_load_checkpoint",
}
"""Methods that other strategies call but this one does not, with an effect on what is trained or saved."""


def check_hooks(module: pl.LightningModule) -> None:
    """Refuse overridden methods that would be ignored.

    ``training_step`` and ``validation_step`` are accepted: a module has them for other strategies.

    Raises:
        ConfigurationError: If there is one; the message names it and what to do.
    """
    for name, remedy in NOT_CALLED.items():
        if is_overridden(name, module, parent=pl.LightningModule):
            raise ConfigurationError(
                f"{type(module).__name__}.{name} is never called by PipeLiteStrategy: {remedy}, and leave {name} out."
            )


def check_plugins(trainer: pl.Trainer) -> None:
    """Refuse plugins that would be ignored.

    Raises:
        ConfigurationError: If there is one; the message names it and what to do.
    """
    checkpoint_io = trainer._accelerator_connector.checkpoint_io
    if checkpoint_io is not None and type(checkpoint_io) is not TorchCheckpointIO:
        raise ConfigurationError(
            f"Trainer(plugins=[{type(checkpoint_io).__name__}]) is not supported by PipeLiteStrategy, which writes "
            "checkpoints itself, one file per stage, in the background; leave it out."
        )
    precision = trainer.precision_plugin
    if type(precision) is not Precision:
        raise ConfigurationError(
            f"Trainer(plugins=[{type(precision).__name__}]) is not supported by PipeLiteStrategy: every layer keeps "
            "the dtype that the module gives it; leave it out."
        )
