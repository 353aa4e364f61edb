"""ModelCheckpoints that share a folder, under the strategy and under Lightning's own single-device one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_jobs import ROWS, Mlp, data
from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.checkpoint.writer import CheckpointWriter
from stage_jobs import trainer_for

ROW: dict[str, list[dict[str, Any]]] = {
    "all and the best": [
        {"every_n_epochs": 1, "save_top_k": -1},
        {"monitor": "eval/loss", "save_top_k": 1},
    ],
    "three of one name": [{"filename": "model", "monitor": "train/loss", "every_n_train_steps": 1, "save_top_k": 3}],
    "all of one name": [{"filename": "model", "every_n_train_steps": 2, "save_top_k": -1}],
    "by epoch": [{"filename": "{epoch}", "monitor": "train/loss", "every_n_train_steps": 2, "save_top_k": 2}],
    "the last ones": [
        {"monitor": "eval/loss", "save_top_k": 2, "save_last": True},
        {"monitor": "train/loss", "mode": "max", "save_top_k": 2, "save_last": True},
    ],
    "links": [{"filename": "{step}", "every_n_train_steps": 2, "save_top_k": 1, "save_last": "link"}],
    "written over": [{"filename": "model", "every_n_train_steps": 2, "enable_version_counter": False}],
}


def named(folder: str, name: str, plain: bool) -> dict[str, Any]:
    """Return the files, and what the callbacks believe; the strategy is made to write slowly."""
    saving = [ModelCheckpoint(folder, **options) for options in ROW[name]]
    trainer = trainer_for(
        "auto" if plain else PipeLiteStrategy(1), 1, max_epochs=3, callbacks=saving, enable_checkpointing=True,
        num_sanity_val_steps=0,
    )  # fmt: skip
    loaders = [DataLoader(data(rows), batch_size=ROWS) for rows in (20, 8)]
    write = CheckpointWriter._write_together

    def slowly(*args: Any) -> Any:
        time.sleep(0.05)
        return write(*args)

    with mock.patch.object(CheckpointWriter, "_write_together", slowly):
        trainer.fit(Mlp(), *loaders)
    held = [
        {Path(path).name for path in (*each.best_k_models, each.best_model_path, each.last_model_path) if path}
        for each in saving
    ]
    files = sorted(path.name for path in Path(folder).iterdir())
    assert all(name in files for names in held for name in names)
    steps = {} if plain else {file: _step(Path(folder, file)) for file in files}
    if plain:
        steps = {file: torch.load(Path(folder, file), weights_only=False)["global_step"] for file in files}
    return {"files": files, "held": held, "steps": steps, "restored": type(saving[0]._fs).__name__}


def _step(path: Path) -> int:
    import json

    return int(json.loads((path / "meta.json").read_text())["step"])
