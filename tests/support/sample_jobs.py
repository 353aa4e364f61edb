"""A training that writes samples, run by each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.callbacks import Samples, SaveTrained
from lightning_pipelite.data import DatasetConfig


class Losses(Callback):
    """Records the losses."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["train/loss"]))


def train_with_samples(
    job: str, output: str, stages: int, ranks: int, prompts: list[str], virtual_stages: int = 1
) -> list[float]:
    """Train a LoRA with dropout for two steps, each with an evaluation; return the losses."""
    L.seed_everything(3, verbose=False)
    folder, losses = Path(job), Losses()
    callbacks: list[Callback] = [losses, SaveTrained(f"{output}/adapter")]
    if prompts:
        callbacks.append(Samples(prompts, max_new_tokens=5))
    trainer = L.Trainer(
        strategy=PipeLiteStrategy(stages, virtual_stages=virtual_stages), accelerator="cpu", devices=ranks, max_steps=2,
        val_check_interval=1, callbacks=callbacks, logger=TensorBoardLogger(output), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    module = PipeLiteModule(str(folder / "model"), LoRA(4, dropout=0.3), lr=3e-2, dtype="float32", schedule="constant")
    data = PackedDataModule(
        [DatasetConfig(str(folder / "texts" / "*.txt"))], sequence_len=64, tokenizer_dir=str(folder / "model"),
        cache_dir=str(folder / "cache"), eval_fraction=0.1,
    )  # fmt: skip
    trainer.fit(module, data)
    return losses.found
