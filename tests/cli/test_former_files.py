"""A configuration and a checkpoint from before the package's modules were moved still work unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_pipelite.cli.convert_command import convert
from processes import Workers
from tiny_job import write_job

CONFIG = Path(__file__).with_name("former_config.yaml")
STEP = "step=00000002.ckpt"
LATER_OPTIONS = {
    "allow_another_base", "fp8_transpose_cache", "load_in_fp8", "offload_optimizer", "overwrite", "virtual_stages"
}  # fmt: skip
LATER_STATE = {"made_with", "evaluation_follows"}


def fit(directory: str, *arguments: str) -> None:
    from lightning_pipelite.cli.main import main

    os.chdir(directory)
    sys.argv = ["pipelite", "fit", *arguments]
    main()


def without(content: Any, names: set[str]) -> Any:
    """Return the content without these keys, at any depth."""
    if isinstance(content, dict):
        return {key: without(value, names) for key, value in content.items() if key not in names}
    return [without(value, names) for value in content] if isinstance(content, list) else content


def as_before(checkpoint: Path) -> None:
    """Remove from a checkpoint what earlier ones did not have, and update its manifest."""
    for name in ("meta.json", "trainer.json"):
        content = json.loads((checkpoint / name).read_text())
        changed = without(content, LATER_OPTIONS | LATER_STATE)
        assert changed != content
        (checkpoint / name).write_text(json.dumps(changed))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (checkpoint / name).read_bytes()
        assert entry.keys() == {"size", "sha256"}
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    text = json.dumps(manifest)
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")


@pytest.fixture(scope="module")
def trained(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps with the former configuration; convert the checkpoint of step 2 to the former format."""
    folder = write_job(tmp_path_factory.mktemp("former") / "job")
    (folder / "config.yaml").write_text(CONFIG.read_text().replace("FOLDER", str(folder)))
    workers.run(1, fit, str(folder), "--config", "config.yaml")
    as_before(folder / "ck" / STEP)
    return folder


def test_they_are_taken_up(trained: Path, workers: Workers) -> None:
    shutil.copytree(trained / "ck" / STEP, trained / "again" / "ck" / STEP)
    workers.run(1, fit, str(trained / "again"), "--config", str(trained / "config.yaml"), f"--ckpt_path=ck/{STEP}")
    expected, found = (load_file(trained / run / "trained" / "adapter_model.safetensors") for run in (".", "again"))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("by", ["the checkpoint", "the configuration"])
def test_they_are_converted(trained: Path, by: str, tmp_path: Path) -> None:
    former, config = trained / "ck" / STEP, str(trained / "config.yaml") if by == "the configuration" else None
    assert convert(str(former), str(tmp_path / "converted"), config) == f"{tmp_path / 'converted'}: LoRA from step 2."
    converted = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    state = load_file(former / "stage-00.safetensors")
    trained_values = {name: value for name, value in state.items() if name.startswith("parameter/") and "lora_" in name}
    assert len(converted) == len(trained_values) > 0
    for name, value in trained_values.items():
        of = name.split("model.layers.", 1)[1].replace(".default", "")
        torch.testing.assert_close(next(v for key, v in converted.items() if key.endswith(of)), value, rtol=0, atol=0)
