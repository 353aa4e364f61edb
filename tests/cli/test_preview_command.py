"""What ``pipelite preview`` shows of a configuration for fit."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.cli import main as cli
from lightning_pipelite.data import DatasetConfig, PackedDataModule
from packed_files import EOS

GREEN, MAGENTA, DIM, RESET = "\x1b[32m", "\x1b[35m", "\x1b[2;3m", "\x1b[0m"


@pytest.fixture
def config(tmp_path: Path, tokenizer_dir: Path) -> dict[str, Any]:
    for name, texts in {"a": ["one fish", "two"], "b": ["red é fish"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "trainer": {"max_steps": 3},
        "model": {"model_dir": str(tokenizer_dir), "adapter": {"class_path": "LoRA", "init_args": {"rank": 2}}},
        "data": {
            "datasets": [
                {"dataset_path": str(tmp_path / "a.jsonl")},
                {"dataset_path": str(tmp_path / "b.jsonl"), "control_class": -1},
            ],
            "sequence_len": 64,
            "mix_datasets": True,
            "mask_tokens": EOS,
            "eval_fraction": 0,
            "cache_dir": str(tmp_path / "cache"),
        },
    }


def run(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["pipelite", "preview", "--config", str(tmp_path / "config.yaml"), *arguments])
    cli.main()


def test_borders_masks_and_classes_are_seen(
    tmp_path: Path,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def parts(text: str) -> tuple[str, str, int]:
        """Return a document's first token, its other tokens, and the number of tokens including EOS."""
        ids = tokenizer.encode(text, add_special_tokens=False)
        return tokenizer.decode(ids[:1]), tokenizer.decode(ids[1:]), len(ids) + 1

    def plain() -> str:
        run(tmp_path, config, monkeypatch)
        return capsys.readouterr().out

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    summary, *shown = plain().split("\n\n")
    first, *others = summary.split("\n")
    assert first == f"{tmp_path / 'a.jsonl'}: text: text; loss on everything"
    assert others[1].startswith("train: 3 documents")
    assert others[-1].startswith("marks: « » is context only, not learnt (questions, masked and first tokens); all ")
    assert others[-1].endswith("; each document's header gives its class for a Control Adapter, +1 or -1")
    (sequence,) = shown
    head, *lines = sequence.rstrip().split("\n")
    assert head.startswith("sequence 1: 3 documents, ")
    borders, texts = lines[:-1:2], lines[1::2]
    assert lines[-1].startswith("── padding, ")
    labels = 0
    at = 0
    for border, text in zip(borders, texts, strict=True):
        source = re.sub("[«»]|</?s>", "", text)
        first, rest, size = parts(source)
        # BOS belongs to the first document, so that document's first token has a predecessor and is a label.
        wanted = f"«<s>»{source}«</s>»" if at == 0 else f"«{first}»{rest}«</s>»"
        assert text == wanted.replace("»«", "")
        size += at == 0
        assert border == f"── document at {at}, {size} tokens, class {'-1' if 'red' in source else '+1'}"
        labels += size - 2
        at += size
    assert head == f"sequence 1: 3 documents, {labels} labels, 64 tokens"
    assert lines[-1] == f"── padding, {64 - at} tokens"

    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = plain()
    assert f"{DIM}<s>{RESET}" in coloured
    assert f"{DIM}</s>{RESET}" in coloured
    assert "«" not in coloured
    first, rest, _ = parts("red é fish")
    assert f"{MAGENTA}{rest}{RESET}" in coloured or f"{MAGENTA}{first}{rest}{RESET}" in coloured
    assert f", class +1{RESET}" in coloured
    assert GREEN in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in plain()


def test_classes_are_told_where_there_are_any(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"]["datasets"] = config["data"]["datasets"][:1]
    run(tmp_path, config, monkeypatch)
    shown = capsys.readouterr().out
    assert "── document at 0" in shown
    assert ", class " not in shown
    run(tmp_path, config, monkeypatch, "--data.sequence_len", "128")  # options are given as to fit
    assert "labels, 128 tokens" in capsys.readouterr().out


def test_as_many_as_asked_for_in_the_order_of_training(
    tmp_path: Path,
    config: dict[str, Any],
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def text_of(batch: dict[str, Tensor]) -> str:
        return re.sub("(</s>)+$|\n", "", tokenizer.decode(batch["input_ids"].flatten()))

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(tmp_path, config, monkeypatch, "--sequences", "2")
    _, *sequences = re.split("^sequence .*$", capsys.readouterr().out, flags=re.MULTILINE)
    shown = [re.sub("[«»]|^── .*$|\n", "", sequence, flags=re.MULTILINE) for sequence in sequences]
    datasets = [DatasetConfig(**each) for each in config["data"].pop("datasets")]
    data = PackedDataModule(datasets, tokenizer_dir=config["model"]["model_dir"], **config["data"])
    loader = data.train_dataloader()
    assert [re.sub("(</s>)+$", "", text) for text in shown] == [text_of(each) for each in itertools.islice(loader, 2)]
    assert text_of(next(iter(loader))) != text_of(loader.dataset[0])  # the order is shuffled


@pytest.mark.parametrize(
    ("edit", "arguments", "says"),
    [
        ({"data": None}, [], "data must be given in .*config.yaml"),
        ({"model": {}}, [], r"model\.model_dir must be given in .*config\.yaml"),
        ({"data": {"sequence_len": 64}}, [], r"data\.datasets must be given"),
        ({"data": {"tokenizer_dir": "x"}}, [], r"data\.tokenizer_dir is always model\.model_dir; leave it out"),
        ({}, ["--sequences", "0"], "sequences is 0: give a positive number"),
        ({}, ["--config", "none.yaml"], r"there is no configuration file none\.yaml"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    tmp_path: Path,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edit: dict[str, Any],
    arguments: list[str],
    says: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, {**config, **edit}, monkeypatch, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1

    assert re.search(says, error), error


def test_options_are_checked_as_by_fit(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for edit, says in (
        ({"sequence_length": 3}, "sequence_length is not an option"),
        ({"sequence_len": 100}, "data.sequence_len must be a positive multiple of 64"),
        ({"sequence_len": "x"}, "data.sequence_len must be an integer, not x."),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, {**config, "data": {**config["data"], **edit}}, monkeypatch)
        assert says in capsys.readouterr().err
