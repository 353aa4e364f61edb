"""Options of the data module, from Python, YAML and the command line, and the messages about wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.errors import ConfigurationError
from packed_files import items, write_jsonl

MakeData = Callable[..., PackedDataModule]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": []}, r"data\.datasets is empty"),
        ({"datasets": [DatasetConfig("x.txt", max_tokens=0)]}, r"max_tokens of x\.txt must be positive, not 0"),
        ({"sequence_len": 100}, r"data\.sequence_len must be a positive multiple of 64 .*, not 100"),
        ({"sequence_len": 0}, r"data\.sequence_len must be a positive .*, not 0"),
        ({"eval_fraction": 1.0}, r"data\.eval_fraction must be .* less than 1, not 1\.0"),
        ({"eval_fraction": -0.1}, r"data\.eval_fraction must be .*, not -0\.1"),
        ({"max_sequences": 1}, r"data\.max_sequences is 1, but training needs a sequence, and so does evaluation"),
        ({"max_sequences": 0, "eval_fraction": 0}, r"data\.max_sequences is 0"),
        ({"eval_gradient_accumulation_steps": 0}, r"data\.eval_gradient_accumulation_steps must be .*, not 0"),
        ({"seed": -1}, r"data\.seed must be .*, not -1"),
        ({"packing": "tight"}, r"data\.packing must be concatenate, best_fit or null, not tight"),
        (
            {"packing": "best_fit", "drop_tails": True},
            r"data\.drop_tails truncates documents, which best-fit packing never",
        ),
        ({"datasets": [DatasetConfig("x.txt", control_class=2)]}, r"control_class of x\.txt must be -1, 0 or 1, not 2"),
        ({"datasets": [DatasetConfig("x.txt", weight=0.0)]}, r"weight of x\.txt must be positive and finite, not 0\.0"),
        ({"datasets": [DatasetConfig("x.txt", weight=1.0), DatasetConfig("y.txt")]}, r"y\.txt has no weight"),
        ({"eval_datasets": [DatasetConfig("y.txt", weight=1.0)]}, r"y\.txt in data\.eval_datasets has a weight"),
        ({"eval_datasets": [DatasetConfig("y.txt", max_tokens=0)]}, r"max_tokens of y\.txt must be positive, not 0"),
    ],
)
def test_options_out_of_range(make_data: MakeData, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_data(**{"datasets": [DatasetConfig("x.txt")], **options})


def test_errors_when_files_are_read(tmp_path: Path, make_data: MakeData) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer_dir is not set"):
        make_data([source], tokenizer_dir=None).prepare_data()
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer_dir .*gone is not a directory"):
        make_data([source], tokenizer_dir=str(tmp_path / "gone")).prepare_data()
    with pytest.raises(ConfigurationError, match=r"dataset_path gone\.txt matches no file"):
        make_data([DatasetConfig("gone.txt")]).prepare_data()
    with pytest.raises(ConfigurationError, match=r"a\.jsonl, line 1: no field 'body'"):
        make_data([DatasetConfig(source.dataset_path, text_field="body")]).prepare_data()
    empty = write_jsonl(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(ConfigurationError, match=r"b\.jsonl contains no document with any tokens"):
        make_data([source, empty], document_suffix="").prepare_data()


def test_the_former_default_of_text_field_beside_what_is_named_and_for_text_files(
    tmp_path: Path, make_data: MakeData
) -> None:
    """Configurations that were saved with that default still work."""
    (tmp_path / "a.txt").write_text("one two")
    make_data([DatasetConfig(str(tmp_path / "a.txt"), text_field="text")]).prepare_data()
    assert DatasetConfig("x", text_field="text", messages_field="talk") == DatasetConfig("x", messages_field="talk")
    make_data([DatasetConfig("x", text_field="text", messages_field="talk")])
    with pytest.raises(ConfigurationError, match="x has both text_field and messages_field"):
        make_data([DatasetConfig("x", text_field="words", messages_field="talk")])


YAML = """
datasets:
  - dataset_path: {path}
    max_tokens: 5000
  - dataset_path: {path}
    text_field: text
sequence_len: 128
tokenizer_dir: {tokenizer}
sequence_prefix: [1, 2]
document_prefix: ""
document_suffix: 7
mask_tokens: {mask}
max_sequences: 50
cache_dir: {cache}
"""


@pytest.mark.parametrize(
    ("mask", "expected"), [("true", [0, 1]), ("3", [3]), ("1", [1]), ("[3, 4]", [3, 4]), ("null", [])]
)
def test_from_yaml(tmp_path: Path, tokenizer_dir: Path, texts: list[str], mask: str, expected: list[int]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    parser = ArgumentParser()
    parser.add_class_arguments(PackedDataModule, "data")
    (tmp_path / "data.yaml").write_text(
        YAML.format(path=source.dataset_path, tokenizer=tokenizer_dir, mask=mask, cache=tmp_path / "cache")
    )
    config = parser.parse_args([f"--data={tmp_path / 'data.yaml'}"])
    data = parser.instantiate_classes(config).data
    data.prepare_data()
    [meta] = (tmp_path / "cache").glob("*/meta.json")
    assert json.loads(meta.read_text())["masked_ids"] == expected
    first = items(data.train_dataloader())[0]["input_ids"]
    assert first[:2] == [1, 2]
    assert 7 in first
    assert len(first) == 128
    assert "BOS if it has one" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("<s>", "<s>"), ("[1, 2]", [1, 2]), ("null", None), ("", "")])
def test_prefix_on_the_command_line(text: str, value: Any) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PackedDataModule, "data")
    arguments = ['--data.datasets=[{"dataset_path": "a.txt"}]', "--data.sequence_len=64"]
    config = parser.parse_args([*arguments, f"--data.sequence_prefix={text}"])
    assert config.data.sequence_prefix == value
