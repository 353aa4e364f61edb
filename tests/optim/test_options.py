"""The options of docs/adapters.md on the command line."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from lightning_pipelite.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    command = ["pipelite", "fit", "--config", str(ROOT / "configs" / "lora.yaml"), *arguments, "--print_config"]
    monkeypatch.setattr(sys, "argv", command)
    with contextlib.suppress(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    return err if "pipelite: error" in err else out


def test_the_block_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "optimizer" in block)
    (tmp_path / "block.yaml").write_text(block)
    model = yaml.safe_load(printed(monkeypatch, capsys, "--config", str(tmp_path / "block.yaml")))["model"]
    assert (model["optimizer"]["class_path"], model["optimizer"]["init_args"]["weight_decay"]) == (
        "torch.optim.AdamW",
        0.01,
    )
    assert (model["lr"], model["schedule"], model["warmup_steps"]) == (1e-4, "cosine", 20)
    assert model["parameter_groups"] == {"lora_B": {"lr": 1e-3}}


def test_an_optimizer_of_optimi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.optimizer", "optimi.StableAdamW", "--model.optimizer.kahan_sum", "true"]
    model = yaml.safe_load(printed(monkeypatch, capsys, *options))["model"]
    assert model["optimizer"]["class_path"] == "optimi.StableAdamW"
    assert model["optimizer"]["init_args"]["kahan_sum"] is True


def test_the_learning_rate_has_one_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(monkeypatch, capsys, "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "1.0")
    assert "model.optimizer.lr is not an option" in said
