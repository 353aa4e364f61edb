"""A build's key covers everything that affects it; it runs once, and its result is complete or absent."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_pipelite.data import DatasetConfig, PackedDataModule, corpus
from lightning_pipelite.data.build import PackBuilder
from lightning_pipelite.errors import ConfigurationError
from packed_files import items, write_jsonl

MakeData = Callable[..., PackedDataModule]


CHANGES: dict[str, Any] = {
    "sequence_len": 128,
    "max_sequences": 7,
    "drop_tails": True,
    "mix_datasets": True,
    "packing": "best_fit",
    "sequence_prefix": "",
    "document_prefix": 5,
    "document_suffix": "",
    "mask_tokens": True,
    "eval_fraction": 0.3,
    "add_prefix_space": True,
    "trust_remote_code": True,
    "skip_bad_records": True,
    "seed": 1,
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of all builds that run."""
    builds: list[Path] = []
    build = PackBuilder.__call__

    def note(self: PackBuilder, folder: Path) -> None:
        builds.append(folder)
        build(self, folder)

    monkeypatch.setattr(PackBuilder, "__call__", note)
    return builds


def test_second_start_reuses(tmp_path: Path, make_data: MakeData, texts: list[str], built: list[Path]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    first, second = make_data([source]), make_data([source])
    for data in (first, first, second):
        data.prepare_data()
        data.setup("fit")
    assert len(built) == 1
    assert first.statistics == second.statistics
    assert items(first.train_dataloader()) == items(second.train_dataloader())
    for read_only in ({"isolate_documents": False}, {"eval_gradient_accumulation_steps": 3}):
        make_data([source], **read_only).prepare_data()
    assert len(built) == 1


def test_whatever_matters_changes_the_key(
    tmp_path: Path,
    make_data: MakeData,
    make_tokenizer: Callable[..., Path],
    texts: list[str],
    built: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_pipelite.data.tokens.DocumentTokenizer._check_prefix_space", lambda *_: None)
    folder = make_tokenizer({"bos_token": "<s>", "eos_token": "</s>"})
    source = write_jsonl(tmp_path / "a.jsonl", texts[:20])
    other = write_jsonl(tmp_path / "b.jsonl", texts[15:35])
    datasets = {
        "max_tokens": [DatasetConfig(source.dataset_path, max_tokens=10_000)],
        "control_class": [DatasetConfig(source.dataset_path, control_class=-1)],
        "weight": [DatasetConfig(source.dataset_path, weight=2.0)],
        "file": [other],
        "two": [source, other],
    }
    count = 0
    for options in (
        {},
        *({key: value} for key, value in CHANGES.items()),
        *({"datasets": d} for d in datasets.values()),
        {"eval_datasets": [other]},
    ):
        options = {"datasets": [source], "tokenizer_dir": str(folder), "eval_fraction": 0.2, **options}
        make_data(options.pop("datasets"), **options).prepare_data()
        count += 1
        assert len(built) == count, options

    def start() -> int:
        make_data([source], tokenizer_dir=str(folder)).prepare_data()
        return len(built)

    assert start() == start() == count + 1
    os.utime(source.dataset_path, ns=(0, 0))
    assert start() == start() == count + 2
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    assert start() == start() == count + 3


def test_file_that_changes_while_it_is_read(
    tmp_path: Path, make_data: MakeData, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    data = make_data([source])
    build = PackBuilder.__call__

    def disturb(self: PackBuilder, folder: Path) -> None:
        build(self, folder)
        write_jsonl(tmp_path / "a.jsonl", texts[1:])

    monkeypatch.setattr(PackBuilder, "__call__", disturb)
    with pytest.raises(ConfigurationError, match="file changed while it was being read"):
        data.prepare_data()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def left_behind(cache: Path) -> list[str]:
    """Return what a cache holds apart from complete entries and locks."""
    return [path.name for path in cache.iterdir() if not re.fullmatch(r"[0-9a-f]{32}(\.lock)?", path.name)]


@pytest.mark.slow
def test_killed_at_ten_random_moments(
    tmp_path: Path, make_data: MakeData, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_BATCH_CHARACTERS", 1 << 14)  # small batches, so that worker processes tokenise
    source = write_jsonl(tmp_path / "a.jsonl", [f"{number} {text}" for number in range(6) for text in texts])
    reference = make_data([source], cache_dir=str(tmp_path / "reference"))
    begin = time.perf_counter()
    reference.prepare_data()
    whole = time.perf_counter() - begin
    expected = [items(reference.train_dataloader()), items(reference.val_dataloader())]

    chance, killed, halves = random.Random(0), 0, 0
    for number in range(10):
        cache = tmp_path / str(number)
        make = functools.partial(make_data, [source], cache_dir=str(cache))
        process = multiprocessing.get_context("fork").Process(target=make().prepare_data)
        process.start()
        time.sleep(chance.uniform(0, whole))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        halves += cache.exists() and bool(left_behind(cache))
        data = make()
        data.prepare_data()
        assert data.statistics == reference.statistics
        assert [items(data.train_dataloader()), items(data.val_dataloader())] == expected
        assert not left_behind(cache)
    assert killed >= 5
    assert halves >= 2


def test_damaged_entry(tmp_path: Path, make_data: MakeData, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    make_data([source]).prepare_data()
    [packed] = (tmp_path / "cache").glob("*/train.arrow")
    os.truncate(packed, 1000)
    with pytest.raises(ConfigurationError, match=r"The cache entry .* is damaged .*: delete it"):
        make_data([source]).prepare_data()
