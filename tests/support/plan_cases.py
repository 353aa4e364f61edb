"""Configurations to plan for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_config(path: Path, model_dir: Path, stages: int = 4, virtual_stages: int = 1, **model: Any) -> Path:
    """Write a configuration of a LoRA."""
    options = {"pipeline_stages": stages, "virtual_stages": virtual_stages}
    strategy = {"class_path": "lightning_pipelite.PipeLiteStrategy", "init_args": options}
    content = {
        "trainer": {"accumulate_grad_batches": 8, "strategy": strategy},
        "model": {
            "model_dir": str(model_dir),
            "adapter": {"class_path": "lightning_pipelite.adapters.LoRA", "init_args": {"rank": 16}},
            **model,
        },
        "data": {"sequence_len": 4096, "datasets": [{"dataset_path": "texts/*.txt"}]},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def write_model_config(directory: Path, config: dict[str, Any]) -> Path:
    """Write config.json, from which a plan can be made."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
