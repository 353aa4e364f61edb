"""A LightningModule around layers that are built one stage at a time."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn


class HandedLayers(L.LightningModule):
    """Trains the given layers with a squared error and SGD."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self._layers = layers

    def pipeline_layers(self) -> Any:
        return self._layers, nn.functional.mse_loss

    def training_step(self, *_: Any) -> None:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)
