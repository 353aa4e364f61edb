"""Layers that are built one stage at a time, under names that several stages have."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from handed_layers import HandedLayers
from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError

WIDTH = 4


class Layers:
    """Two linear layers.

    Args:
        names: Name of each.
        seeds: Seed of each.
        outputs: Output width of the second one.
        trained: Whether the second one is trained.
    """

    def __init__(self, names: list[str], seeds: list[int], outputs: int, trained: bool) -> None:
        self.names = ["Linear"] * 2
        self._names, self._seeds, self._outputs, self._trained = names, seeds, outputs, trained

    def parameter_counts(self) -> list[int]:
        return [20, 20]

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        built: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(start, stop):
            torch.manual_seed(self._seeds[number])
            layer = nn.Linear(WIDTH, self._outputs if number else WIDTH)
            built[self._names[number]] = layer.requires_grad_(self._trained or not number)
        return nn.Sequential(built).to(device)


def told(names: list[str], seeds: list[int], outputs: int = WIDTH, trained: bool = True) -> list[str]:
    """Return the warnings of a training in two stages, or its error."""
    trainer = L.Trainer(
        strategy=PipeLiteStrategy(2), accelerator="cpu", devices=2, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    rows = [(torch.ones(1, WIDTH), torch.ones(1, outputs))] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(HandedLayers(Layers(names, seeds, outputs, trained)), DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
        except ConfigurationError as error:
            return [str(error)]
    return [str(each.message) for each in caught if "occur in several stages" in str(each.message)]
