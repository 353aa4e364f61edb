"""What newcomers read first is correct: the quick paths, the tables of what fits, the GPUs' rates, the Dockerfile."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.cli.plan_command import plan
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


@pytest.fixture(scope="module")
def what_fits() -> Iterator[Any]:
    """Import the program that writes the tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        import what_fits

        patch.delitem(sys.modules, "what_fits")
        yield what_fits


def tables() -> dict[str, list[str]]:
    """Return the rows of the page's tables, by the cards' size in GB."""
    parts = re.findall(r"^### (\d+) GB: .*\n\n((?:\|.*\n)+)", FIT, re.MULTILINE)
    return {size: rows.splitlines() for size, rows in parts}


def test_the_tables_are_what_their_program_writes(what_fits: Any, tmp_path: Path) -> None:
    """Checks the rows of one base; the program writes those of all bases."""
    kept, base = tables(), "Llama 3.2 1B"
    modes = what_fits.simulations(base, str(tmp_path))
    assert [*kept] == [str(card.sold) for card in what_fits.CARDS]
    for card in what_fits.CARDS:
        rows = kept[str(card.sold)]
        assert rows[:2] == what_fits.head()
        assert rows[2] == what_fits.row(base, modes, card)
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == [*what_fits.BASES]
        assert what_fits.heading(card) in FIT


@pytest.mark.parametrize(("base", "size", "count"), [("Qwen3 14B", 24, 2), ("Qwen3 4B", 12, 2)])
def test_a_cell_is_what_the_command_lists(what_fits: Any, tmp_path: Path, base: str, size: int, count: int) -> None:
    """The cell shows the fastest row of the plan that fits, in the heaviest mode that has one."""
    (tmp_path / "config.json").write_text(json.dumps(what_fits.BASES[base]))
    card = next(card for card in what_fits.CARDS if card.sold == size)
    (row,) = (row for row in tables()[str(size)] if row.startswith(f"| {base} |"))
    cell, expected = row.strip("| ").split(" | ")[1 + what_fits.COUNTS.index(count)], "-"
    for mode in what_fits.MODES:
        given = Configuration(tuple(what_fits.words(mode, str(tmp_path), count)))
        report = plan(given, memory=None if card.gpu else f"{card.gib}GiB", device=card.gpu)
        assert report.sequences == what_fits.SEQUENCES
        listed = str(report).partition("sequences per step")[2]
        fitting = re.findall(r"^ +(\d) +\d+ .*?([\d.]+) s   fits$", listed, re.MULTILINE)
        if fitting:
            stages, seconds = min(fitting, key=lambda found: float(found[1]))
            expected = mode + (f", {stages} stages" if stages != "1" else "")
            break
    name, _, speed = cell.partition(": ")
    assert name == expected
    assert bool(speed) == bool(card.gpu)
    if speed:
        told = what_fits.SEQUENCES * what_fits.TOKENS / float(seconds)
        assert float(speed.replace(",", "")) == pytest.approx(told, rel=0.01)


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


def test_the_rates_to_choose_are_those_that_learn() -> None:
    """Each configuration, the page and the benchmark, which found no fault, have the same rate."""
    page = (ROOT / "docs" / "choosing.md").read_text()
    result = (ROOT / "benchmarks" / "results" / "learning.md").read_text()
    assert "Each as it should be" in result
    measured = {}
    for name, rate, change in re.findall(
        r"^\| (\w+(?:, .*?)?) \| ([\d.e-]+) \| .* \| (\S+ %) \|$", result, re.MULTILINE
    ):
        measured[name] = (float(rate), change)
    told = {}
    for names, rest, rate, change in re.findall(
        r"^\| .*?((?:`\w+`(?:, )?)+)(texts of .*?)? ?\| (\S+) \| (\S+ %) \|$", page, re.MULTILINE
    ):
        for name in re.findall(r"`(\w+)`", names):
            told[f"{name}, {rest}" if rest else name] = (float(rate), change)
    assert told == measured
    for name, (rate, _) in told.items():
        config = yaml.safe_load((ROOT / "configs" / f"{name.split(',')[0]}.yaml").read_text())
        assert config["model"]["lr"] == rate
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("quickstart")}
    assert {name.split(",")[0] for name in told} == shipped


def test_the_dockerfile() -> None:
    """No container engine runs here, so this checks the text and the files that it refers to."""
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
