"""What newcomers read first is so: the quick paths, the table of what fits, the cards' rates, the Dockerfile."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.planning.gpus import GIB, GPUS, REACHED, REACHED_BANDWIDTH
from lightning_pipelite.planning.settings import settings_of

ROOT = Path(__file__).resolve().parents[2]
FIT = (ROOT / "docs" / "will-it-fit.md").read_text(encoding="utf-8")


def test_the_quick_paths_are_options_of_fit() -> None:
    rows = re.findall(r"^\| (one|two|four) of 24 GB \|.*\| `(.*)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["one", "two", "four"]
    for count, (_, options) in zip((1, 2, 4), rows, strict=True):
        words = ["--config", str(ROOT / "configs/qlora.yaml"), "--model.model_dir", "DIR", *shlex.split(options)]
        settings = settings_of(Configuration(tuple(words)).read(), "")
        assert (settings.devices, settings.stages) == (count, count)
        assert settings.model["load_in_4bit"]


def test_the_rates_are_those_that_are_gone_by() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", FIT, re.MULTILINE)
    assert [name for name, _ in rows] == list(GPUS)
    for name, cells in rows:
        gpu = GPUS[name]
        *figures, source = (cell.strip() for cell in cells.split("|"))
        values = [float(cell) if cell else None for cell in figures]
        told = [round(gpu.memory / GIB, 2), gpu.tflops, gpu.fp8, gpu.fp32, gpu.bandwidth, gpu.link]
        assert values == told
        assert source.startswith("NVIDIA")
    for share, kind in ((REACHED[2], "of bf16's"), (REACHED[1], "of FP8's"), (REACHED[4], "of float32's")):
        assert f"{round(100 * share)} % {kind}" in FIT
    assert f"{round(100 * REACHED_BANDWIDTH)} % of the memory's" in FIT


def test_the_dockerfile() -> None:
    """No engine runs here: its text, with what it copies and calls."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert re.fullmatch(r"FROM python:3\.1[0-3]-slim", lines[0])
    assert [line.split()[0] for line in lines] == ["FROM", "RUN", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"]
    constraints = re.search(r"--constraint /opt/lightning_pipelite/(\S+) /opt/lightning_pipelite$", lines[3])
    assert constraints
    assert (ROOT / constraints[1]).is_file()
    assert 'ENTRYPOINT ["pipelite"]' in lines
    page = (ROOT / "docs" / "machines.md").read_text()
    for command in re.findall(r"^#   (docker .*)$", text, re.MULTILINE):
        assert command in page
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv"} <= set(ignored)
    assert not {"kernels", "lightning_pipelite", "constraints.txt", "README.md"} & set(ignored)
