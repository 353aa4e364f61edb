"""Data files as users have them: what is found, the line that reports it, and labels equal to a rendering by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import people_read
import people_refused
from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.data.templates import TEMPLATES
from lightning_pipelite.errors import ConfigurationError
from people_files import QA, is_as_expected, lines, put, several


@pytest.mark.parametrize("name", people_read.CASES)
def test_what_is_found(make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path, name: str) -> None:
    case = people_read.CASES[name]
    dataset = case.dataset(tmp_path / "data_of_people")
    data = make_data([dataset], sequence_len=256, tokenizer_dir=str(chat_dir), eval_fraction=0, **case.module)
    assert data.summary()[0] == f"{dataset.dataset_path}: {case.says}"
    assert len(data.train_dataloader().dataset) == 1
    (item,) = (item for item in data.train_dataloader())
    assert is_as_expected(case, item, PreTrainedTokenizerFast.from_pretrained(chat_dir))


@pytest.mark.parametrize("name", people_refused.CASES)
def test_what_is_refused(make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path, name: str) -> None:
    case = people_refused.CASES[name]
    dataset = case.dataset(tmp_path / "data_of_people")
    data = make_data([dataset], sequence_len=256, tokenizer_dir=str(chat_dir), eval_fraction=0, **case.module)
    with pytest.raises(ConfigurationError, match=case.says):
        data.prepare_data()


def test_files_of_other_splits_are_told(
    make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path
) -> None:
    several(lines("d/train.jsonl", QA), lines("d/test.jsonl", {**QA, "question": "x"}))(tmp_path)
    both = [DatasetConfig(str(tmp_path / "d"))]
    data = make_data(both, eval_datasets=both, sequence_len=128, tokenizer_dir=str(chat_dir), eval_fraction=0)
    told = [line for line in data.summary() if line.startswith("dataset")]
    assert [re.search("files not read: .*", line)[0] for line in told] == [  # type: ignore[index]
        "files not read: test.jsonl", "files not read: train.jsonl",
    ]  # fmt: skip


def test_unknown_template(make_data: Callable[..., PackedDataModule], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"data\.chat_template llama is not a file: set it to a \.jinja file, "
    ):
        make_data([DatasetConfig("x")], chat_template="llama")
    path = put(tmp_path / "a.jinja", TEMPLATES["chatml"])
    make_data([DatasetConfig("x")], chat_template=str(path))
