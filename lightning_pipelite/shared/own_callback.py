"""A callback that a module adds for the duration of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override


class OwnCallback(pl.Callback):
    """Removes itself from the Trainer when a run ends, however it ends: Lightning would keep it for the next module."""

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)  # no teardown follows

    def _leave(self, trainer: Any) -> None:
        trainer.callbacks = [each for each in trainer.callbacks if each is not self]
