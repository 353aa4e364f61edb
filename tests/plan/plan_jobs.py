"""A training whose plan cannot be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.data import DatasetConfig
from lightning_pipelite.errors import ConfigurationError


class NeedsValues(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        float(self.param_groups[0]["params"][0].sum())
        return super().step(closure)


def told_by_auto(job: str) -> str:
    """What a training says that is to be cut by its plan."""
    model = str(Path(job) / "model")
    data = PackedDataModule([DatasetConfig(f"{job}/texts/*.txt")], sequence_len=64, tokenizer_dir=model)
    module = PipeLiteModule(model, LoRA(2), dtype="float32", optimizer=NeedsValues, schedule="constant")
    trainer = L.Trainer(
        strategy=PipeLiteStrategy(1, partition_method="auto"), accelerator="cpu", devices=1, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    except ConfigurationError as error:
        return str(error)
    return "trained"
