"""Any LightningModule as a pipeline: a byte-level language model that uses only the strategy of this project.

    python examples/drop_in.py --stages 2 --devices 2

This is an ordinary module, which trains under any strategy. All that the pipeline needs is `pipeline_layers`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipelite import PipeLiteStrategy

CONTEXT, WIDTH, BLOCKS = 16, 128, 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.inner(hidden)


class NextByte(L.LightningModule):
    """Predicts each byte from the sixteen before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, WIDTH)),
            *(Residual() for _ in range(BLOCKS)),
            nn.Linear(WIDTH, 256),
        )

    def pipeline_layers(self) -> tuple[list[nn.Module], Callable[[Tensor, Tensor], Tensor]]:
        return list(self.layers), nn.functional.cross_entropy

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        contexts, targets = batch
        return nn.functional.cross_entropy(self.layers(contexts), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("eval/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def windows(text: str) -> TensorDataset:
    """Return windows of sixteen bytes of a text, and the byte after each."""
    found = torch.tensor(list(text.encode())).unfold(0, CONTEXT + 1, 3)
    return TensorDataset(found[:, :-1], found[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    L.seed_everything(0)
    texts = [topics[name] for name in sorted(topics)]
    trainer = L.Trainer(
        strategy=PipeLiteStrategy(arguments.stages), devices=arguments.devices, accelerator="auto",
        accumulate_grad_batches=8, max_steps=arguments.steps, limit_val_batches=32, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        val_check_interval=8 * arguments.steps,
    )  # fmt: skip
    trainer.fit(
        NextByte(),
        DataLoader(windows("".join(texts[10:])), batch_size=64),
        DataLoader(windows("".join(texts[:10])), batch_size=64),
    )
    trainer.print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
