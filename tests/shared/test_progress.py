"""The progress of commands, with and without a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from transformers.utils import logging

from lightning_pipelite.shared import progress
from lightning_pipelite.shared.progress import Progress, duration, from_tqdm, track, view
from terminal import terminal


class Clock:
    """Replaces the clock by one that advances only on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_lines_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    for _ in track(range(32), "merging", "tensors"):
        clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "merging (31 %): 10 of 32 tensors, 0:10, 0:22 left",
        "merging (62 %): 20 of 32 tensors, 0:20, 0:12 left",
        "merging (94 %): 30 of 32 tensors, 0:30, 0:02 left",
    ]


def test_what_is_done_soon_needs_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "converting", "files")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_the_end_may_be_unknown_and_units_large(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("tokenising", unit="MB", scale=1e6) as bytes_read:
        clock.now += 4000
        bytes_read.reach(12_345_678)
    assert capsys.readouterr().err == "tokenising: 12.3 MB, 1:06:40\n"


def test_only_the_outermost_speaks_and_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)

    def work() -> None:
        for _ in track(range(2), "outer", "parts"):
            for _ in track(range(3), "inner", "steps"):
                clock.now += 10

    work()
    assert {line.split()[0] for line in capsys.readouterr().err.splitlines()} == {"outer"}
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    work()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    with pytest.raises(ZeroDivisionError), Progress("failing", 2):
        raise ZeroDivisionError
    work()  # the failed one does not count as still running
    assert "outer" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "shown"), [("xterm-256color", "━"), ("dumb", "|")])
def test_bars_in_terminals(kind: str, shown: str) -> None:
    with terminal(kind) as screen:
        bar = view("merging", stays=True)
        bar.update(3, 4, "3 of 4 tensors")
        bar.print("a line between")
        bar.update(4, 4, "4 of 4 tensors")
        bar.close()
    assert shown in screen.text
    assert "3 of 4 tensors" in screen.text
    assert "4 of 4 tensors" in screen.text
    assert "\na line between" in screen.text.replace("\r", "\n").replace("\x1b[2K", "\n")
    assert not screen.text.endswith("\x1b[?25l")  # the cursor is visible again


def test_what_goes_to_a_file_does_not_go_to_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    with terminal("xterm-256color") as screen:
        sys.stdout = sys.__stdout__
        bar = view("merging")
        print("a result")
        bar.close()
    assert "a result" not in screen.text


def test_transformers_bars_are_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    former = logging.set_tqdm_hook(from_tqdm)
    try:
        for _ in logging.tqdm({"a": 1, "b": 2}.items(), desc="Loading weights"):
            clock.now += 10
    finally:
        logging.set_tqdm_hook(former)
    assert capsys.readouterr().err.startswith("loading weights (50 %): 1 of 2 tensors, 0:10, 0:10 left\n")


def test_tokenising_counts_the_bytes_of_all_files(tmp_path: Path) -> None:
    from lightning_pipelite.data.config import DatasetConfig
    from lightning_pipelite.data.corpus import _batches

    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path in paths:
        path.write_text("some words " * 40_000)
    datasets = [DatasetConfig(str(path)) for path in paths]

    class Options:
        sources, shapes, skip_bad_records = datasets, None, False

    options: Any = Options()
    read = [batch.read for batch in _batches(options, [[path] for path in paths], [])]
    assert read == sorted(read)
    assert read[-1] == sum(path.stat().st_size for path in paths)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.9, 59, 61, 3600 + 62)] == ["0:00", "0:59", "1:01", "1:01:02"]
