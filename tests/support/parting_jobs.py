"""Each way in which the ranks of a pipeline can end up with different data, and what each rank raises."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_jobs import Mlp, data
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy.agreement import Agreement
from stage_jobs import Catchable, Module, trainer_for
from stage_models import Model

ROWS = 8


class Rows(Dataset[Any]):
    """Rows whose inputs and targets are the row's number."""

    def __init__(self, kind: str, rank: int) -> None:
        self.kind, self.order = kind, list(range(ROWS))
        self.length = ROWS - 2 * rank if kind == "length" else ROWS
        self.rank, self.random = rank, random.Random(rank)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.kind == "dataset that shuffles itself" and index == 0:
            self.random.shuffle(self.order)
        row = torch.full((6,), float(self.order[index]))
        if self.kind == "transform" and self.rank == 1:
            row[3] += 1e-6  # a tiny change in a single number
        if self.kind == "shape" and index == 5:
            row = row[: 6 - self.rank]
        return row, row[:1]


class Unsized(IterableDataset[Any]):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        for index in range(ROWS - 2 * self.rank):
            yield torch.full((6,), float(index)), torch.zeros(1)


class ByTime(Sampler[int]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.rows)))
        random.Random(time.perf_counter()).shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return len(self.rows)


class Draw(L.Callback):
    """Draws a random number on one rank only, as a plot might."""

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            torch.rand(1)


def part(kind: str, evaluates: bool, stages: int, replicas: int) -> dict[str, Any]:
    """Run a fit of three epochs, or evaluate, with diverging ranks; return the steps taken, and what is raised."""
    torch.manual_seed(1)
    random.seed(1)
    strategy = Catchable(stages)
    last = int(int(os.environ["RANK"]) // replicas == stages - 1)  # whether this rank is to differ
    given = Rows(kind, last) if kind != "unsized" else Unsized(last)
    sampler = ByTime(given) if kind == "sampler" else None
    shuffle = kind == "a number drawn on one rank"
    loader = DataLoader(given, batch_size=1 if kind == "shape" else 2, shuffle=shuffle or None, sampler=sampler)
    good: Any = DataLoader(Rows("", 0), batch_size=2)
    layers: list[nn.Module] = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)]
    if kind == "shape":
        layers = [nn.Sequential(nn.AdaptiveAvgPool1d(6), nn.Linear(6, 6)), nn.Linear(6, 1)]
    steps = itertools.count()

    class Counting(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            next(steps)

    trainer = trainer_for(
        strategy, stages * replicas, max_epochs=3, accumulate_grad_batches=2, callbacks=[Draw()],
        num_sanity_val_steps=0, check_val_every_n_epoch=1,
    )  # fmt: skip
    module = Counting(Model(layers, [], nn.functional.mse_loss))
    try:
        if evaluates:
            trainer.validate(module, loader, verbose=False)
        else:
            trainer.fit(module, loader, good)
    except ConfigurationError as error:
        return {"error": str(error), "steps": next(steps), "epoch": trainer.current_epoch}
    return {"error": None, "steps": next(steps), "epoch": trainer.current_epoch}


def fit_with(options: list[dict[str, Any]], rates: list[float], gammas: list[float]) -> str | None:
    """Fit with Trainer options, a learning rate and a schedule for each rank; return the error, if any."""
    rank = int(os.environ["RANK"])

    class Own(Mlp):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=rates[rank])
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gammas[rank])]

    trainer = trainer_for(Catchable(len(rates)), len(rates), **{"max_steps": 1, **options[rank]})
    try:
        trainer.fit(Own(), DataLoader(data(16), batch_size=4))
    except ConfigurationError as error:
        return str(error)
    return None


def add_up(places: tuple[str, str | None]) -> list[float] | str:
    """Sum numbers over ranks, each with its own place; a rank without one announces where it is instead."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    agreement = Agreement(Topology(2, 1), rank, timedelta(seconds=30))
    place = places[rank]
    try:
        if place is None:
            agreement.tell("epoch 0")
            return "nothing"
        return agreement.add_up([rank * 1.5, 3.0], place)
    except ConfigurationError as error:
        return str(error)
