"""Evaluations, alone and between fits, and their results."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_jobs import ROWS, Mlp, data
from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError
from stage_jobs import Catchable, Module, trainer_for
from stage_models import Model, linears, token_loss, tokens


def fit_and_validate(stages: int) -> list[float]:
    """Evaluate with one trainer and with new ones: before a fit, after it, and in a second fit of the same module."""
    module = Mlp()
    losses = []

    def validate(trainer: L.Trainer) -> None:
        losses.append(trainer.validate(module, DataLoader(data(20), batch_size=ROWS), verbose=False)[0]["eval/loss"])

    def fresh() -> L.Trainer:
        return trainer_for(PipeLiteStrategy(stages), stages, max_epochs=1, accumulate_grad_batches=2)

    validate(fresh())
    trainer = fresh()
    trainer.fit(module, DataLoader(data(40), batch_size=ROWS))
    validate(trainer)
    validate(fresh())
    again = fresh()
    again.fit(module, DataLoader(data(40), batch_size=ROWS))
    validate(again)
    return losses


def fit_and_validate_plainly() -> list[float]:
    module, losses = Mlp(), []

    def validate() -> None:
        trainer = trainer_for("auto", 1)
        losses.append(trainer.validate(module, DataLoader(data(20), batch_size=ROWS), verbose=False)[0]["eval/loss"])

    def train() -> None:
        trainer = trainer_for("auto", 1, max_epochs=1, accumulate_grad_batches=2)
        trainer.fit(module, DataLoader(data(40), batch_size=ROWS))

    validate()
    train()
    validate()
    validate()
    train()
    validate()
    return losses


class Tested(Mlp):
    """Records its test hooks."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: PT028 - a hook
        self.log("test/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def on_test_start(self) -> None:
        self.hooks.append("on_test_start")

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.hooks.append("on_test_batch_end")

    def on_test_epoch_end(self) -> None:
        self.hooks.append(f"on_test_epoch_end in {'training' if self.training else 'evaluation'}")


def fit_and_test(stages: int | None, loaders: int) -> tuple[list[dict[str, float]], list[str]]:
    """Fit, then test over one or several loaders; ``stages`` of None is Lightning's own single-device strategy."""
    module = Tested()
    trainer = trainer_for("auto" if stages is None else PipeLiteStrategy(stages), stages or 1, max_epochs=1)
    trainer.fit(module, DataLoader(data(40), batch_size=ROWS))
    module.hooks.clear()
    sets = [DataLoader(data(20 + 8 * index), batch_size=ROWS) for index in range(loaders)]
    metrics = trainer.test(module, sets if loaders > 1 else sets[0], verbose=False)
    return [{name: float(value) for name, value in each.items()} for each in metrics], module.hooks


class Dealt(DistributedSampler[Any]):
    """Distributes rows to replicas, padding with None."""

    def __init__(self, rows: Any, **replica: int) -> None:
        super().__init__(rows, **replica, shuffle=False)
        self.rows = rows

    def __iter__(self) -> Any:
        padded = [*range(len(self.rows)), *[None] * (self.total_size - len(self.rows))]
        return iter(padded[self.rank :: self.num_replicas])


class Rows(Dataset[Any]):
    """Micro-batches; None is one without targets."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int | None) -> Any:
        inputs, targets = self.batches[index or 0]
        return (inputs, targets) if index is not None else (inputs, torch.full_like(targets, -100))


def validate_set(kind: str, number: int, stages: int, replicas: int) -> tuple[float, list[str]]:
    """Evaluate partly masked sequences by a token loss; return the loss and the warnings."""
    torch.manual_seed(4)
    rows = Rows(tokens(number))
    model = Model(linears(4), [], token_loss)
    strategy = PipeLiteStrategy(stages)
    trainer = trainer_for(strategy, stages * replicas, use_distributed_sampler=True)
    sampler = Dealt(rows, **strategy.distributed_sampler_kwargs) if kind == "dealt" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = DataLoader(rows, batch_size=None, sampler=sampler)
        loss = trainer.validate(Module(model), loaded, verbose=False)[0]["eval/loss"]
    return loss, [str(warning.message) for warning in caught]


def fit_and_validate_lora(model_dir: str, stages: int) -> list[float]:
    """Evaluate a model from disk before and after its fit by the same trainer, which must use the trained adapter."""
    from exact_training import Scale, Sequences, sequences
    from lightning_pipelite import PipeLiteModule
    from lightning_pipelite.adapters import LoRA

    strategy = PipeLiteStrategy(stages)
    data = Sequences(sequences(Scale(sequences=4)))
    trainer = trainer_for(strategy, stages, max_epochs=3)
    module = PipeLiteModule(model_dir, LoRA(rank=4), lr=0.05, dtype="float32")
    loaded = DataLoader(data, batch_size=1)
    before = trainer.validate(module, loaded, verbose=False)[0]["eval/loss"]
    trainer.fit(module, loaded, loaded)
    in_fit = float(trainer.callback_metrics["eval/loss"])
    after = trainer.validate(module, loaded, verbose=False)[0]["eval/loss"]
    tested = trainer.test(module, loaded, verbose=False)[0]
    assert tested.keys() == {"test/loss", "test/perplexity"}
    assert abs(tested["test/loss"] - after) < 1e-6
    return [before, in_fit, after]


def parameters_seen(model_dir: str, hook: str, named: bool) -> int | str:
    """Return how many parameters of a PipeLiteModule a callback sees in a hook, or the error it gets."""
    from exact_training import Scale, Sequences, sequences
    from lightning_pipelite import PipeLiteModule
    from lightning_pipelite.adapters import LoRA

    found: list[Any] = []

    def ask(trainer: L.Trainer, module: L.LightningModule, *_: Any, **__: Any) -> None:
        found.extend(module.named_parameters() if named else module.parameters())

    callback = L.Callback()
    setattr(callback, hook, ask)
    trainer = trainer_for(Catchable(1), 1, max_steps=1, callbacks=[callback])
    module = PipeLiteModule(model_dir, LoRA(rank=4), dtype="float32")
    try:
        trainer.fit(module, DataLoader(Sequences(sequences(Scale(sequences=4))), batch_size=1))
    except ConfigurationError as error:
        return str(error)
    return len(found)
