"""Files in the same place: none is read twice, and files that are read together are reported."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.data.config import PackingOptions
from lightning_pipelite.data.looking import find_all
from lightning_pipelite.data.splits import of_one_split
from lightning_pipelite.data.together import remarks
from lightning_pipelite.errors import ConfigurationError
from people_files import QA, lines, put, several


def write(folder: Path, *names: str) -> None:
    for name in names:
        put(folder / name, "x")


def found(folder: Path, pattern: str = "", split: str | None = None) -> list[str]:
    options = PackingOptions([DatasetConfig(str(folder / pattern), split)], 64)
    return [str(file.relative_to(folder)) for files in find_all(options) for file in files]


DOUBLES = [
    ("train.jsonl", "train.jsonl.gz"),
    ("x.json", "x.jsonl"),
    ("x.jsonl", "x.parquet"),
    ("Data.csv", "data.parquet"),
    ("train.arrow", "train-00000-of-00001.parquet"),
    ("train-00000-of-00001.parquet", "train-00000-of-00002.parquet"),
    ("train-00000-of-00001-a3ecf92756993583.parquet", "train-00000-of-00001.parquet"),
    ("book.txt", "book.md"),
    ("book.txt", "book.txt.bz2"),
    ("data.jsonl", "data (1).jsonl"),
    ("data.jsonl", "data - Copy.jsonl"),
    ("data.jsonl", "data_backup.jsonl"),
    ("essay.txt", "essay copy.txt"),
    ("data.jsonl", "Copy of data.jsonl"),
    ("data.jsonl", "data (1).jsonl.gz"),
]


@pytest.mark.parametrize("names", DOUBLES)
def test_what_is_there_twice(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = tmp_path / "d"
    write(folder, *names, "more.jsonl" if names[0] == "x.json" else names[0])
    one, other = sorted(names)
    for pattern in ("", "*"):
        with pytest.raises(ConfigurationError) as refused:
            found(folder, pattern)
        assert str(refused.value) == (
            f"{folder / pattern} has {one} and {other}, which by their names hold the same data: move one of them "
            "elsewhere, or set dataset_path to the one to use."
        )
    assert found(folder, names[0]) == [names[0]]


@pytest.mark.parametrize(
    "names",
    [
        ("a.txt", "b.md"),
        ("a.jsonl", "b.jsonl.gz"),
        ("data (1).jsonl", "data (2).jsonl"),
        ("copy.txt", "copy that.txt"),
        ("copy of the moon.txt", "moon.txt"),
        ("old.txt", "the old.txt"),
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("A.TXT", "b.Md"),
    ],
)
def test_what_is_there_once(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, *names)
    assert found(tmp_path) == sorted(names)


def test_a_file_is_not_read_by_a_link_to_it_too(tmp_path: Path) -> None:
    write(tmp_path / "d", "data.jsonl")
    (tmp_path / "d" / "latest.jsonl").symlink_to("data.jsonl")
    (tmp_path / "again").symlink_to("d")
    (tmp_path / "e").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "e" / name).symlink_to(tmp_path / "d" / "data.jsonl")
    for pattern in ("d", "again", "d/*", "**/data.jsonl"):
        with pytest.raises(
            ConfigurationError, match=r"data\.jsonl and .*\.jsonl, which are the same file through a link"
        ):
            found(tmp_path, pattern)
    assert len(found(tmp_path, "e")) == 2  # as in a download that stores equal files once; this is reported
    assert found(tmp_path, "again/data.jsonl") == ["again/data.jsonl"]


def test_many_files_are_seen_through_at_once() -> None:
    files = [Path(f"/d/train_{number:05}x.txt") for number in range(20_000)]
    began = time.perf_counter()
    assert remarks("/d/*", files)[0].endswith("and 19994 more read together")
    with pytest.raises(ConfigurationError, match="set split to one of them"):
        of_one_split(files, None, "/d/*", root=Path("/d"), evaluation=False, named=True)
    assert time.perf_counter() - began < 20  # not hours, as it would take to compare all pairs


def test_doubles_of_other_splits_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "test.jsonl", "test.jsonl.gz")
    assert found(tmp_path) == ["train.jsonl"]
    with pytest.raises(ConfigurationError, match=r"test\.jsonl and test\.jsonl\.gz"):
        found(tmp_path, split="test")


@pytest.mark.parametrize("ending", [".txt", ".md", ".txt.gz"])
def test_sets_of_texts_are_not_mixed(tmp_path: Path, ending: str) -> None:
    write(tmp_path, f"train_sft{ending}", f"train_gen{ending}")
    with pytest.raises(ConfigurationError, match="holds the splits train_gen, train_sft: set split to the one"):
        found(tmp_path)
    with pytest.raises(ConfigurationError, match="matches files of the splits train_gen, train_sft: set split"):
        found(tmp_path, "*")
    assert found(tmp_path, split="train_sft") == [f"train_sft{ending}"]


def test_what_programs_leave_is_no_data(tmp_path: Path) -> None:
    left = ["train.jsonl~", "._train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", "__MACOSX/._train.jsonl",
            "Thumbs.db", ".DS_Store", "README.md", "LICENSE.txt", "dataset_card.md", "COPYING.txt", "requirements.txt",
            "cache-0123456789abcdef.arrow", "dataset_info.json", ".cache/huggingface/a.json"]  # fmt: skip
    write(tmp_path, "train.jsonl", *left)
    for pattern in ("", "*.jsonl", "**/*.jsonl"):
        assert found(tmp_path, pattern) == ["train.jsonl"]
    write(tmp_path / "splits", ".ipynb_checkpoints/a.jsonl", "__MACOSX/b.jsonl", "train/a.jsonl", "test/b.jsonl")
    assert found(tmp_path / "splits") == ["train/a.jsonl"]


def test_a_license_is_a_text_by_its_beginning_alone(tmp_path: Path) -> None:
    write(tmp_path, "licensed to kill.txt", "noticeable.txt", "citations in law.txt", "authorship.txt")
    assert len(found(tmp_path)) == 4


def test_what_is_read_together_is_told(make_data: Callable[..., PackedDataModule], tmp_path: Path) -> None:
    write(tmp_path / "t", "train_sft.txt", "train_gen.txt", "notes.txt", "LICENSE.txt")
    several(lines("r/a.jsonl", QA), lines("r/a2.jsonl", {**QA, "answer": "Kyiv."}), lines("r/b.jsonl", QA))(tmp_path)
    several(lines("m/a.jsonl", {"text": "x"}), lines("m/b.jsonl", {"text": "y"}), lines("m/c.jsonl", QA))(tmp_path)
    write(tmp_path / "m", "more/d.jsonl", "images/e.png", ".hidden/f.jsonl", "__MACOSX/g.jsonl", "data/h.jsonl")
    paths = [str(tmp_path / "t" / "*.txt"), str(tmp_path / "r"), str(tmp_path / "m"), str(tmp_path / "m" / "c.jsonl")]
    text, pair = "text: text; loss on everything", "question/answer: question, answer; loss on answer"
    assert make_data([DatasetConfig(path) for path in paths]).found() == [
        f"{paths[0]}: {text}; train_gen.txt, train_sft.txt read together; LICENSE.txt also read as data",
        f"{paths[1]}: {pair}; a.jsonl and b.jsonl are identical, and both are read",
        f"{paths[2]}: {text} (a.jsonl and 1 more) | {pair} (c.jsonl); folders not read: more",
        f"{paths[3]}: {pair}; c.jsonl also read by the dataset {paths[2]}",
    ]


def test_all_files_for_evaluation_too(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.txt", "c.txt")
    everything = DatasetConfig(str(tmp_path))
    some = DatasetConfig(str(tmp_path / "[ab].txt"))
    one = DatasetConfig(str(tmp_path / "a.txt"))
    for datasets, evaluation in (
        ([everything], [everything]),
        ([some], [everything]),
        ([one, replace(some, max_tokens=5, weight=2.0)], [one, everything]),
    ):
        with pytest.raises(ConfigurationError, match="none is left for training"):
            find_all(_reading(datasets, evaluation))
    for datasets, evaluation in (
        ([everything], []),
        ([everything], [some]),
        ([some, everything], [some]),
        ([some], [replace(some, max_tokens=5)]),  # these may be other documents
        ([some], [replace(some, text_field="story")]),
    ):
        assert len(find_all(_reading(datasets, evaluation))) == len(datasets) + len(evaluation)


def _reading(datasets: list[DatasetConfig], evaluation: list[DatasetConfig]) -> PackingOptions:
    weighted = any(dataset.weight for dataset in datasets)
    datasets = [replace(each, weight=each.weight or 1.0) for each in datasets] if weighted else datasets
    return PackingOptions(datasets, 64, evaluation)
