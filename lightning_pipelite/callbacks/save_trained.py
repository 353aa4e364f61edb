"""Saves the trained adapter or model when training ends."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_pipelite.callbacks.support.former_result import refuse_former_result
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.local_path import refuse_remote
from lightning_pipelite.shared.protocol import ChecksSaving, SavesTrained


class SaveTrained(Callback):
    """Writes the trained adapter (a PEFT directory) or model (a Hugging Face directory) at the end of training.

    The module must have a method ``save_trained(directory)``, called on every rank. If it also has
    ``check_save(directory)``, rank 0 calls that before training, so that a directory that cannot be written is reported
    then, not hours later.

    A training started from scratch is refused if there is an earlier result; a resumed one replaces that result once
    the new one is complete.

    Args:
        output_dir: The directory to write.
        overwrite: Replace an earlier result even if training starts from scratch.
    """

    def __init__(self, output_dir: str, overwrite: bool = False) -> None:
        if not output_dir:
            raise ConfigurationError("SaveTrained: output_dir is empty; name the directory to write.")
        refuse_remote(output_dir, "SaveTrained: output_dir")
        self.output_dir = output_dir
        self._failure: Exception | None = None
        self.overwrite = overwrite

    def former_result(self) -> str | None:
        """Return an error message if training from scratch would replace an earlier result."""
        directory = Path(self.output_dir)
        if self.overwrite or not directory.is_dir() or not any(directory.iterdir()):
            return None
        return (
            f"SaveTrained: {self.output_dir} is not empty; choose a new output_dir, resume from a checkpoint "
            "(ckpt_path), or set overwrite (--overwrite) to replace its contents."
        )

    def check(self, module: pl.LightningModule) -> None:
        """Check that the module can save to ``output_dir``.

        Raises:
            ConfigurationError: If it cannot save at all, or (raised by the module) not there.
        """
        if not isinstance(module, SavesTrained):
            raise ConfigurationError(
                f"SaveTrained: {type(module).__name__} has no method save_trained(directory); add it, or leave "
                "SaveTrained out."
            )
        if isinstance(module, ChecksSaving):
            module.check_save(Path(self.output_dir))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.check(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_former_result(trainer, self.former_result())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            assert isinstance(pl_module, SavesTrained)
            pl_module.save_trained(Path(self.output_dir))
        except Exception as error:  # raised in on_fit_end: later callbacks may still save a checkpoint
            rank_zero_warn(f"the trained weights could not be saved to {self.output_dir}: {error}")
            self._failure = error
        else:
            pl_module.print(f"saved the trained weights to {self.output_dir}")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure
