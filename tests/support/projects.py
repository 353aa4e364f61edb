"""Small Lightning projects that do not use this package: plain modules, and a record of their evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
    "enable_progress_bar": False, "num_sanity_val_steps": 0, "max_epochs": 2,
}  # fmt: skip


class Project(L.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("eval/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Project):
    """Optimizes manually, twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.layers[index].parameters(), lr=0.1) for index in (0, 2)]


def rows(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, generator=generator), torch.tensor(index % 2)) for index in range(number)]


class Stream(IterableDataset[Any]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        return iter(rows(self.number))


def loader(batches: int = 8) -> DataLoader[Any]:
    inputs, targets = zip(*rows(2 * batches), strict=True)
    return DataLoader(TensorDataset(torch.stack(inputs), torch.stack(targets)), batch_size=2)


def stream(batches: int = 8) -> DataLoader[Any]:
    return DataLoader(Stream(2 * batches), batch_size=2)


class Evaluations(L.Callback):
    """Records after which steps evaluations run."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)
