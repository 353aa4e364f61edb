"""Trainings on packed data, in the processes of a pipeline."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Full

Row = tuple[int, ...]


def trainer_for(strategy: PipeLiteStrategy, processes: int, **options: Any) -> L.Trainer:
    return L.Trainer(
        strategy=strategy, accelerator="cpu", devices=processes, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, **options,
    )  # fmt: skip


# One step on packed documents


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        named = module.pipeline_stage.named_parameters()
        self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}


def packed_step(model_dir: str, data: dict[str, Any], stages: int) -> tuple[float, dict[str, Tensor]]:
    """Train all sequences in one optimizer step; return the loss, and this stage's gradients."""
    packed = PackedDataModule(**data)
    packed.prepare_data()
    assert packed.statistics is not None
    gradients = Gradients()
    trainer = trainer_for(
        PipeLiteStrategy(stages), stages, max_epochs=1, callbacks=[gradients],
        accumulate_grad_batches=packed.statistics.train.sequences,
    )  # fmt: skip
    trainer.fit(PipeLiteModule(model_dir, Full(), dtype="float32", activation_memory="keep"), datamodule=packed)
    return float(trainer.callback_metrics["train/loss"]), gradients.found


# Trainings that are interrupted


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(384, 4)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.embedding(inputs[0])


class Tiny(L.LightningModule):
    """A model of two layers that records what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([First(), nn.Linear(4, 384)])
        self.waiting: list[Row] = []
        self.trained: list[tuple[int, list[Row]]] = []  # the epoch and this replica's rows of each step

    def pipeline_layers(self) -> Any:
        def loss(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            total = nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")
            return total, (labels != -100).sum()

        return list(self.layers), loss

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> Any:
        return (batch["input_ids"], batch["position_ids"]), batch["labels"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        (ids, _), labels = batch
        if (labels != -100).any():  # else it is an empty one, which evens out the replicas' shares
            self.waiting.append(tuple(ids[0].tolist()))

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.trainer.fit_loop._should_accumulate():
            self.trained.append((self.current_epoch, self.waiting))
            self.waiting = []

    def training_step(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(L.Callback):
    """Saves a checkpoint after a micro-batch of the second epoch, and stops."""

    def __init__(self, micro_batch: int, path: str) -> None:
        self.micro_batch, self.path = micro_batch, path

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == self.micro_batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def train(
    data: dict[str, Any], stages: int, replicas: int, accumulate: int, path: str, stop: int | None = None
) -> list[tuple[int, list[Row]]]:
    """Train up to a micro-batch of the second epoch, or from there to the end of the third."""
    torch.manual_seed(0)
    module = Tiny()
    trainer = trainer_for(
        PipeLiteStrategy(stages), stages * replicas, max_epochs=3, accumulate_grad_batches=accumulate,
        callbacks=[] if stop is None else [StopAt(stop, path)],
    )  # fmt: skip
    trainer.fit(module, datamodule=PackedDataModule(**data), ckpt_path=path if stop is None else None)
    return module.trained
