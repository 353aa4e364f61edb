"""Which split a file belongs to, by its name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_pipelite.data.sources import find_files, not_read
from lightning_pipelite.errors import ConfigurationError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def found(folder: Path, pattern: str = "", **more: Any) -> list[str]:
    root = folder / pattern if pattern else folder
    return [str(file.relative_to(folder)) for file in find_files(str(root), **more)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("oh.train.jsonl", "oh.test.jsonl"),
        ("v1.0_train.jsonl", "v1.0_test.jsonl"),
        ("alpaca_train_v2.jsonl", "alpaca_test_v2.jsonl"),
        ("my_training_set.jsonl", "my_test_set.jsonl"),
        ("my_training_set/x.jsonl", "my_test_set/x.jsonl"),
        ("trainset.json.gz", "testset.json.gz"),
        ("trainSet.csv", "valSet.csv"),
        ("x train 1.txt", "x held-out 1.txt"),
        ("train.jsonl", "holdout.jsonl"),
        ("train.jsonl", "tests.jsonl"),
        ("train2.jsonl", "evals2.jsonl"),
        ("train_clean/y.jsonl", "test_clean/x.jsonl"),
        ("train/x.jsonl", "test/train_like.jsonl"),
        ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"),
        ("my_training_set-00000-of-00001.parquet", "my_test_set-00000-of-00001-a3ecf92756993583.parquet"),
    ],
)
def test_each_is_read_by_itself(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path, train, test)
    assert found(tmp_path) == [train]
    assert found(tmp_path, evaluation=True) == [test]
    assert found(tmp_path, train) == [train]
    assert found(tmp_path, test) == [test]
    with pytest.raises(ConfigurationError, match="matches files of the splits"):
        found(tmp_path, "**/*.*")


@pytest.mark.parametrize(
    ("names", "pattern", "says"),
    [
        (("corpus.jsonl", "test.jsonl"), "*.jsonl", "whose name indicates none"),
        (("y.jsonl", "test/x.jsonl"), "**/*.jsonl", "whose name indicates none"),
        (("train/en/y.jsonl", "test/en/x.jsonl"), "**/*.jsonl", "of the splits test, train: set split"),
        (("train_clean/y.jsonl", "test_clean/x.jsonl"), "*/*.jsonl", "of the splits test, train: set split"),
        (("train_on_test.jsonl", "train.jsonl"), "", "train_on_test.jsonl indicates the splits test and train"),
        (("train/dev/y.jsonl", "train/x.jsonl"), "**/*.jsonl", "indicates the splits train and validation"),
        (("train_sft-00000-of-00001-a3ecf92756993583.parquet", "train_gen-00000-of-00001-0123456789abcdef.parquet"),
         "", "holds the splits train_gen, train_sft: set split"),
        (("train_sft-00000-of-00001-a3ecf92756993583.parquet", "train_gen-00000-of-00001-0123456789abcdef.parquet"),
         "*.parquet", "matches files of the splits train_gen, train_sft: set split"),
    ],
)  # fmt: skip
def test_what_is_not_clear(tmp_path: Path, names: tuple[str, ...], pattern: str, says: str) -> None:
    write(tmp_path, *names)
    with pytest.raises(ConfigurationError, match=says):
        found(tmp_path, pattern)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("x.jsonl", "train/a.jsonl"), "has data in x.jsonl and in the folder of a split, train: set dataset_path"),
        (("data/x.jsonl", "my_test_set/a.jsonl", "train/a.jsonl"), "data in data/x.jsonl and .*, my_test_set: set"),
        (("data/train.jsonl", "data/test/a.jsonl"), "data in data/train.jsonl and .*, data/test: set dataset_path"),
    ],
)
def test_files_beside_folders_of_splits(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    write(tmp_path, *names, "README.md", "images/about.txt")
    with pytest.raises(ConfigurationError, match=says):
        found(tmp_path)
    assert found(tmp_path, names[0]) == [names[0]]


def test_folders_around_tell_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "test" / "train"
    write(folder, "a.jsonl", "latest.jsonl", "contest.jsonl")
    for pattern in ("", "*.jsonl", "**/*.jsonl"):
        assert found(folder, pattern) == ["a.jsonl", "contest.jsonl", "latest.jsonl"]


def test_the_folder_data_is_told_where_it_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "data/b.jsonl")
    assert not_read(str(tmp_path), find_files(str(tmp_path))) == ["data/b.jsonl"]


TWO = [
    ("train_sft.jsonl", "train_gen.jsonl"),
    ("train_sft/x.jsonl", "train_gen/x.jsonl"),
    ("data/train_sft.csv", "data/train_gen.csv.gz"),
    ("train_sft.jsonl", "train_gen-00000-of-00001.parquet"),
    ("sft.train.0001.jsonl", "gen.train.0001.jsonl"),
    ("train_v1.jsonl", "train_v2.jsonl"),
    ("train.jsonl", "train_extra.jsonl"),
]


@pytest.mark.parametrize("names", TWO)
def test_two_sets_for_training_are_not_mixed(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, *names)
    with pytest.raises(
        ConfigurationError, match=r"holds the splits (.+), (.+): set split to the one to train on"
    ) as refused:
        found(tmp_path)
    told = re.findall(r"splits (.+), (.+): set", str(refused.value))[0]
    assert sorted(found(tmp_path, split=each)[0] for each in told) == sorted(names)
    for each in names:
        assert found(tmp_path, each) == [each]
    with pytest.raises(ConfigurationError, match="matches files of the splits"):
        found(tmp_path, "**/*.*")
    with pytest.raises(ConfigurationError, match=f"is other, which does not exist .it has {told[0]}, {told[1]}"):
        found(tmp_path, split="other")


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("train_sft-00000-of-00002-a3ecf92756993583.parquet", "train_sft-00001-of-00002-0123456789abcdef.parquet"),
        ("train_0001.jsonl", "train_0002.jsonl.gz"),
        ("train.jsonl", "train2.jsonl"),
        ("train-part1.jsonl", "train-part-2.jsonl"),
        ("train (1).csv", "train (2).csv"),
        ("oh_train_1.jsonl", "oh-train-2.jsonl"),
        ("train/a.jsonl", "train/b.jsonl"),
        ("train_sft/a.jsonl", "train_sft/b.jsonl"),
        ("a train to busan.txt", "training day.txt"),
    ],
)
def test_parts_of_a_set_stay_together(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, *names)
    assert found(tmp_path) == sorted(names)
    assert found(tmp_path, split="train") == sorted(names)


@pytest.mark.parametrize("ending", [".jsonl", "-00000-of-00001.parquet"])
def test_a_set_is_named_in_full(tmp_path: Path, ending: str) -> None:
    write(tmp_path, *(f"{each}{ending}" for each in ("train_sft", "train_gen", "test_sft", "test_gen")))
    assert found(tmp_path, split="train_gen") == [f"train_gen{ending}"]
    assert found(tmp_path, split="test_sft", evaluation=True) == [f"test_sft{ending}"]
    with pytest.raises(ConfigurationError, match="set split to the one to evaluate on, such as test_gen"):
        found(tmp_path, evaluation=True)
    with pytest.raises(ConfigurationError, match=r"split of .* is train, which does not exist"):
        found(tmp_path, split="train")
