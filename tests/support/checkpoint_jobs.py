"""Trainings that are interrupted, and resumed with other numbers of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from optimi import Adam
from torch import nn

from lightning_pipelite.errors import ConfigurationError
from stage_jobs import Catchable, Module, Steps, collected, loader, trainer_for
from stage_models import CLASSES, WIDTH, Model, token_loss


class Normed(nn.Module):
    """A layer with buffers, persistent ones that training changes and one that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(inputs.flatten(0, 1)).view_as(inputs)


class Resumable(Module):
    def __init__(self, model: Model, optimizer: str) -> None:
        super().__init__(model)
        self.save_hyperparameters({"optimizer": optimizer, "width": WIDTH})

    def configure_optimizers(self) -> Any:
        halves = [list(self.layers[:2].parameters()), list(self.layers[4:].parameters())]
        trained = [{"params": [p for p in half if p.requires_grad]} for half in halves]
        trained[1]["weight_decay"] = 0.1  # type: ignore[assignment]
        if self.hparams["optimizer"] == "optimi":
            optimizer: Any = Adam(trained, lr=0.02)
            scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        else:  # changes the betas with every step
            optimizer = torch.optim.AdamW(trained, lr=0.02)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make(optimizer: str) -> Resumable:
    torch.manual_seed(8)
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    # The gradient of a bias before a norm would be rounding noise, which Adam amplifies.
    first = nn.Linear(WIDTH, WIDTH, bias=False)
    layers = [first, nn.Sequential(Normed(), nn.Tanh()), frozen, first, Normed(), nn.Linear(WIDTH, CLASSES)]
    batches: list[Any] = []
    for index in range(5):
        targets = torch.randint(CLASSES, (3, 6))
        targets[:, :index] = -100
        batches.append((torch.randn(3, 6, WIDTH), targets))
    return Resumable(Model(layers, batches, token_loss), optimizer)


def train(
    folder: str, optimizer: str, stages: int, epochs: int, ckpt_path: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train for some epochs of three steps, with a checkpoint after each evaluation."""
    strategy, steps = Catchable(stages), Steps()
    saving = ModelCheckpoint(folder, "{epoch}-{step}", monitor="eval/loss", save_last=True, save_top_k=2)
    callbacks = [steps, saving, EarlyStopping("eval/loss", patience=9)]
    trainer = trainer_for(
        strategy, stages, max_epochs=epochs, accumulate_grad_batches=2, enable_checkpointing=True,
        callbacks=callbacks, **options,
    )  # fmt: skip
    module = make(optimizer)
    data = loader(module.model.batches, strategy)
    try:
        trainer.fit(module, data, data, ckpt_path=ckpt_path)
    except ConfigurationError as error:
        return {"error": str(error)}
    weights = collected(strategy)
    best = trainer.validate(module, data, ckpt_path="best", verbose=False)[0]["eval/loss"]
    last = trainer.validate(module, data, ckpt_path=f"{folder}/last.ckpt", verbose=False)[0]["eval/loss"]
    return {
        "losses": steps.losses, "norms": steps.norms, "weights": weights, "step": trainer.global_step,
        "best score": float(saving.best_model_score), "best": best, "last": last,  # type: ignore[arg-type]
        "eval": float(trainer.callback_metrics["eval/loss"]), "files": sorted(p.name for p in Path(folder).iterdir()),
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }  # fmt: skip


def validate(path: str, stages: int) -> float:
    """Return the loss of a checkpoint under a new trainer, which has not trained."""
    strategy = Catchable(stages)
    module = make("torch")
    trainer: L.Trainer = trainer_for(strategy, stages)
    return trainer.validate(module, loader(module.model.batches, strategy), path, verbose=False)[0]["eval/loss"]
