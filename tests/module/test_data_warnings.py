"""Warnings about data that does not suit the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, PretrainedConfig

from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Adapter, ControlAdapter, LoRA
from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.module.data_warnings import warn_of_data
from tiny_job import write_job

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def warned(config: PretrainedConfig, adapter: Adapter, length: int = 64, classes: tuple[Any, ...] = (1,)) -> list[str]:
    datasets = [DatasetConfig(f"{number}.txt", control_class=each) for number, each in enumerate(classes)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_data(PackedDataModule(datasets, length, "nowhere"), config, adapter)
    return [str(each.message) for each in seen]


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (LlamaConfig(max_position_embeddings=512), 512),
        (LlamaConfig(max_position_embeddings=512, rope_scaling=YARN), 2048),
        (LlamaConfig(max_position_embeddings=2048, rope_scaling=YARN), 2048),
        (GPT2Config(n_positions=128), 128),
    ],
    ids=["plain", "stretched", "with what it is stretched to", "a table"],
)
def test_sequences_that_are_longer_than_the_model_was_made_for(config: PretrainedConfig, most: int) -> None:
    assert not warned(config, LoRA(2), most)
    (message,) = warned(config, LoRA(2), most + 64)
    assert f"data.sequence_len is {most + 64}" in message
    assert f"made for {most} positions" in message


def test_a_model_without_positions_has_no_most() -> None:
    assert not warned(MambaConfig(), LoRA(2), 64 * 10**4)


@pytest.mark.parametrize("classes", [(1, -1), (0,), (-1, 0), (1, 1, -1)])
def test_both_classes_are_no_matter(classes: tuple[int, ...]) -> None:
    assert not warned(LlamaConfig(), ControlAdapter(2), classes=classes)


@pytest.mark.parametrize("classes", [(1,), (-1, -1)])
def test_a_control_adapter_with_one_class_alone(classes: tuple[int, ...]) -> None:
    (message,) = warned(LlamaConfig(), ControlAdapter(2), classes=classes)
    assert f"have the control_class {classes[0]}" in message
    assert not warned(LlamaConfig(), LoRA(2), classes=classes)


def test_rows_of_tokens_that_the_texts_do_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path / "job")
    texts = [DatasetConfig(str(job / "texts"))]
    data = PackedDataModule(texts, 64, str(job / "model"), cache_dir=str(tmp_path / "cache"))
    held = {token for item in data._open().train for token in item["input_ids"].tolist()}
    absent = next(token for token in range(2, 320) if token not in held)
    there = sorted(held)[:3]
    for rows, told in ((there, False), ([*there, absent], True), ({"lm_head": [absent]}, True)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_data(data, LlamaConfig(), LoRA(2, trainable_token_indices=rows))
        assert [f"has the token {absent} " in str(each.message) for each in seen] == [True] * told


def test_a_module_warns_as_it_is_set_up_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_job(tmp_path / "job") / "model"
    data = PackedDataModule([DatasetConfig("some.txt")], 64, "nowhere")
    monkeypatch.setattr(PipeLiteModule, "trainer", SimpleNamespace(strategy=PipeLiteStrategy(), datamodule=data))
    monkeypatch.setattr(PipeLiteModule, "check_data", lambda *_: None)
    module = PipeLiteModule(str(model), ControlAdapter(2), dtype="float32")
    with pytest.warns(UserWarning, match="have the control_class 1"):
        module.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.setup("validate")


def test_other_data_is_passed_over() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_data(object(), LlamaConfig(), ControlAdapter(2))
        warn_of_data(None, LlamaConfig(), ControlAdapter(2))
