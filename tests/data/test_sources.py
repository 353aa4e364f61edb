"""Which files make up a dataset."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.records import read_records
from lightning_pipelite.data.sources import find_files, not_read
from lightning_pipelite.errors import ConfigurationError
from people_files import save_dataset


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b.txt", "a.json", "README.md", "z.csv.gz", "z.jsonl.gz", "deep/c.txt", "deep/deeper/d.txt", "odd[1].txt"]
    for name in names:
        write(tmp_path / name, "x")

    def found(path: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in find_files(path)]

    assert found(str(tmp_path)) == ["a.json", "b.txt", "odd[1].txt", "z.csv.gz", "z.jsonl.gz"]
    assert not_read(str(tmp_path), find_files(str(tmp_path))) == ["README.md"]
    assert not_read(str(tmp_path / "*.txt"), []) == []
    assert found(str(tmp_path / "b.txt")) == ["b.txt"]
    assert found(str(tmp_path / "odd[1].txt")) == ["odd[1].txt"]
    assert found(str(tmp_path / "**/*.txt")) == ["b.txt", "deep/c.txt", "deep/deeper/d.txt", "odd[1].txt"]
    monkeypatch.chdir(tmp_path)
    assert found("b.txt") == ["b.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/deep/*") == ["deep/c.txt"]


@pytest.mark.parametrize("name", ["none.txt", "none*.txt", "empty"])
def test_nothing_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigurationError, match=rf"dataset_path .*{re.escape(name)} matches no file: set it to a file"
    ):
        find_files(str(tmp_path / name))


def test_unknown_format(tmp_path: Path) -> None:
    write(tmp_path / "a.rtf", "x")
    write(tmp_path / "a.parquet.gz", "x")
    with pytest.raises(ConfigurationError, match=r"a\.parquet\.gz is not in a supported format"):
        find_files(str(tmp_path / "a.parquet.gz"))
    for path in ("a.rtf", "*.rtf"):
        with pytest.raises(ConfigurationError, match=r"a\.rtf is not in a supported format: convert it"):
            find_files(str(tmp_path / path))


def test_saved_dataset(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(7)]
    folder = save_dataset(tmp_path / "saved", texts)
    read = [r.document for path in find_files(str(folder)) for r in read_records(path, DatasetConfig(str(folder)))]
    assert read == texts


def test_saved_dataset_that_cannot_be_read(tmp_path: Path) -> None:
    save_dataset(tmp_path / "both" / "train", ["a", "b"])
    write(tmp_path / "both" / "dataset_dict.json", '{"splits": ["one", "other"]}')
    with pytest.raises(ConfigurationError, match=r"holds the splits one, other: set split to the one to train on"):
        find_files(str(tmp_path / "both"))
    save_dataset(tmp_path / "selected", ["a", "b"], _indices_files=[{"filename": "i.arrow"}])
    with pytest.raises(ConfigurationError, match=r"call flatten_indices\(\) and save it again"):
        find_files(str(tmp_path / "selected"))
    write(tmp_path / "broken" / "state.json", "{")
    with pytest.raises(ConfigurationError, match=r"broken is not a readable Hugging Face dataset"):
        find_files(str(tmp_path / "broken"))
    write(tmp_path / "none" / "state.json", '{"_data_files": []}')
    with pytest.raises(ConfigurationError, match="the Hugging Face dataset is empty"):
        find_files(str(tmp_path / "none"))
