"""Writes what was trained when training ends."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class SaveTrained(Callback):
    """Writes the trained adapter (a PEFT directory) or model (a Hugging Face directory) at the end of training.

    The module must have a method ``save_trained(directory)``, called on every rank.

    Args:
        output_dir: the directory to write; an earlier result in it is replaced once the new one is complete.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fast_dev_run:
            pl_module.save_trained(Path(self.output_dir))
            pl_module.print(f"saved what was trained to {self.output_dir}")
