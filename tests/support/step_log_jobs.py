"""Trainings of one Trainer after another, of a PipeLiteModule and of a module that logs nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_jobs import ROWS, Mlp, data
from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.data import DatasetConfig
from stage_jobs import trainer_for

OURS = {"train/lr", "train/tokens_per_s"}


def one_trainer_for_two_modules(job: str) -> tuple[set[str], set[str]]:
    """What of a PipeLiteModule's own metrics each of the two trainings has logged."""
    trainer: Any = trainer_for(PipeLiteStrategy(), 1, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    model = f"{job}/model"
    texts = [DatasetConfig(f"{job}/texts/*.txt")]
    packed = PackedDataModule(texts, sequence_len=64, tokenizer_dir=model, cache_dir=str(Path(job) / "cache"))
    trainer.fit(PipeLiteModule(model, LoRA(2), dtype="float32", schedule="constant"), packed)
    first = OURS & trainer.callback_metrics.keys()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Mlp(), DataLoader(data(2 * ROWS), batch_size=ROWS))
    assert trainer.global_step == 4
    return first, OURS & trainer.callback_metrics.keys()
