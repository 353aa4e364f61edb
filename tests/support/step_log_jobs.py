"""One Trainer's successive trainings of a PipeLiteModule and of a module that logs nothing itself."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lightning_jobs import ROWS, Mlp, data
from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.data import DatasetConfig
from stage_jobs import trainer_for

OURS = {"train/lr", "train/tokens_per_s"}


class StoppedError(Exception):
    pass


class StopAt(L.Callback):
    """Raises at the end of the micro-batch that completes a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise StoppedError


def one_trainer_for_two_modules(job: str, stops_at: int) -> tuple[set[str], set[str]]:
    """Return which of PipeLiteModule's own metrics each of two trainings has logged; the first one may fail."""
    given = [StopAt(stops_at)]
    trainer: Any = trainer_for(
        PipeLiteStrategy(), 1, max_epochs=1, limit_train_batches=2, limit_val_batches=0, callbacks=list(given)
    )
    model = f"{job}/model"
    texts = [DatasetConfig(f"{job}/texts/*.txt")]
    packed = PackedDataModule(texts, sequence_len=64, tokenizer_dir=model, cache_dir=str(Path(job) / "cache"))
    with contextlib.suppress(StoppedError):
        trainer.fit(PipeLiteModule(model, LoRA(2), dtype="float32", schedule="constant"), packed)
        assert not stops_at
    assert trainer.callbacks == given
    first, steps = OURS & trainer.callback_metrics.keys(), trainer.global_step
    given[0].step = 0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Mlp(), DataLoader(data(2 * ROWS), batch_size=ROWS))
    assert trainer.global_step > steps == 2
    return first, OURS & trainer.callback_metrics.keys()
