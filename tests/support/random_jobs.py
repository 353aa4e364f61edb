"""What the ranks draw at random: rows in the same order on all stages, and dropout."""

from __future__ import annotations

import os
import random
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError
from stage_jobs import Catchable, Module, loader, trainer_for
from stage_models import Model


def seed_this_fit(seed: int | None) -> None:
    """Seed like L.seed_everything, or at random, without passing the seed on to the process's later jobs."""
    if seed is None:
        torch.seed()
        random.seed()
        return
    L.seed_everything(seed)
    del os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]


class Numbered(Dataset[Any]):
    """Rows that carry their number in the inputs and in the targets; they may be augmented at random."""

    def __init__(self, random_rows: bool = False, seed: int = 0) -> None:
        self.random_rows = random_rows
        self.seed = seed

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        name = index + self.seed
        if self.random_rows:
            name += 1000 * int(torch.randint(1000, ())) + 10**6 * random.randrange(100)
        return (torch.randn(6), torch.tensor(name)), torch.tensor(name)


class SideName(nn.Module):
    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.5 if dropout else 0.0)

    def forward(self, inputs: Any) -> Any:
        return self.drop(self.linear(inputs[0])), inputs[1]


def compare_names(kind: str, stages: int, replicas: int) -> dict[str, Any]:
    """Train on numbered rows; return the pairs of numbers in inputs and targets that the loss receives."""
    seed_this_fit(None if kind == "unseeded" else 1)
    pairs: list[tuple[int, int]] = []

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        pairs.extend(zip(outputs[1].tolist(), targets.tolist(), strict=True))
        return outputs[0].square().mean()

    strategy = Catchable(stages)
    rank_seed = 0
    if kind == "different":
        rank_seed = int(os.environ["RANK"])
    dataset = Numbered(kind in ("augmented", "unseeded"), rank_seed)
    injected = kind == "injected"
    trainer = trainer_for(
        strategy, stages * replicas, max_epochs=2, accumulate_grad_batches=3, use_distributed_sampler=injected,
    )  # fmt: skip
    model = Model([SideName(dropout=True) for _ in range(stages)], [], loss)
    try:
        trainer.fit(Module(model), DataLoader(dataset, batch_size=2, shuffle=kind != "different"))
    except ConfigurationError as error:
        return {"error": str(error)}
    return {"pairs": pairs, "sampler": type(trainer.train_dataloader.sampler).__name__}  # type: ignore[union-attr]


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones(64), 0.5, self.training)
        self.seen.append(mask)
        return self.scale(inputs) * mask.mean()


def dropout_masks(stages: int, replicas: int) -> list[list[float]]:
    seed_this_fit(1)
    layers = [Masks() for _ in range(stages)]
    batches = [(torch.randn(2, 1), torch.randn(2, 1)) for _ in range(4)]
    strategy = PipeLiteStrategy(stages)
    trainer = trainer_for(strategy, stages * replicas, max_epochs=1, num_sanity_val_steps=0)
    sampled = loader(batches, strategy)
    trainer.fit(Module(Model(list(layers), batches, nn.functional.mse_loss)), sampled, sampled)
    return [mask.tolist() for mask in layers[strategy.stage_id].seen]
