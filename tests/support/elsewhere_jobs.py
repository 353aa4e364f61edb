"""A training under the strategy whose checkpoint Lightning then loads under other strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stage_jobs import Catchable

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Frozen(L.LightningModule):
    """Has a frozen layer, a buffer, and a scale outside of all layers."""

    def __init__(self, width: int, seed: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["seed"])
        torch.manual_seed(1)  # the frozen layer is always the same, as if loaded from a file
        frozen = nn.Linear(6, width).requires_grad_(False)
        torch.manual_seed(seed)
        self.net = nn.Sequential(frozen, nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))
        self.register_buffer("seen", torch.tensor(float(seed)))

    def pipeline_layers(self) -> Any:
        return list(self.net), nn.functional.cross_entropy

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("eval/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def loader() -> DataLoader[Any]:
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(9))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=4)


def train(folder: Path, stages: int) -> dict[str, Any]:
    """Train, and return the module's state: with several stages, each rank has a part of it."""
    module = Frozen(width=5, seed=7)
    kept = ModelCheckpoint(folder, "{step}", monitor="eval/loss", save_last=True)
    strategy = Catchable(stages, partition_method=f"layers:{'4' if stages == 1 else '3,1'}")
    trainer = L.Trainer(strategy=strategy, devices=stages, max_epochs=1, callbacks=[kept], **QUIET)
    trainer.fit(module, loader(), loader())
    return {
        "path": kept.best_model_path,
        "loss": float(kept.best_model_score),
        "state": {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_meta},
    }


def evaluate(path: str, call: str, strategy: str) -> tuple[float, dict[str, Tensor]]:
    """Evaluate the checkpoint under another strategy; return the loss, and the module's state."""
    module, trainer = Frozen(width=5, seed=4), L.Trainer(strategy=strategy, devices=1, **QUIET)
    found = getattr(trainer, call)(module, loader(), ckpt_path=path)
    if call == "predict":
        labels = torch.cat([batch[1] for batch in loader()])
        found = [{"eval/loss": float(nn.functional.cross_entropy(torch.cat(found), labels))}]
    return found[0]["eval/loss"], dict(module.state_dict())
