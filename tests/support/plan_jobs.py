"""Trainings that are planned."""

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


def run_again(job: str) -> list[tuple[int, int]]:
    """Evaluate, train, and train again on longer sequences that a plan would cut elsewhere; return each run's stage."""
    model = str(Path(job) / "model")
    module, stages = PipeLiteModule(model, LoRA(2), dtype="float32", schedule="constant"), []
    for run, length in (("validate", 64), ("fit", 64), ("fit", 128), ("validate", 128)):
        data = PackedDataModule([DatasetConfig(f"{job}/texts/*.txt")], sequence_len=length, tokenizer_dir=model)
        trainer = L.Trainer(
            strategy=PipeLiteStrategy(2, partition_method="auto"), accelerator="cpu", devices=2, max_steps=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        getattr(trainer, run)(module, datamodule=data)
        stages.append((module.pipeline_stage.start, module.pipeline_stage.stop))
    return stages


def cut_by_speeds(job: str, speeds: list[float]) -> tuple[int, int]:
    """Return the layers of this rank's stage for devices of the given speeds."""
    model = str(Path(job) / "model")
    data = PackedDataModule([DatasetConfig(f"{job}/texts/*.txt")], sequence_len=64, tokenizer_dir=model)
    module = PipeLiteModule(model, LoRA(2), dtype="float32", schedule="constant")
    strategy = PipeLiteStrategy(len(speeds), partition_method="auto", speeds=speeds)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=len(speeds), max_steps=1, accumulate_grad_batches=4, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return module.pipeline_stage.start, module.pipeline_stage.stop


def told_by_auto(job: str) -> str:
    """Return the message of a training that is to be cut by its plan."""
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
