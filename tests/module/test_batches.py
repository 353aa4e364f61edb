"""Batches of common collators give the losses of transformers' own forward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    default_data_collator,
)

from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.module.batches import BatchForm
from processes import Workers
from tiny_job import write_job

ROWS = [[5, 9, 9, 30, 7, 8, 1], [11, 12, 13, 14], [21, 22, 23, 24, 25, 26]]
FORM = BatchForm(320, 320)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job") / "job")


def batch_of(kind: str, model: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model, pad_token="</s>", padding_side="right")
    if kind == "language modeling":
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in ROWS])
        return dict(batch)
    if kind == "flattening":
        return dict(DataCollatorWithFlattening()([{"input_ids": row, "labels": row} for row in ROWS]))
    if kind == "flattening for kernels":
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        return dict(collator([{"input_ids": row, "labels": row} for row in ROWS]))
    if kind == "default":
        return dict(default_data_collator([{"input_ids": row[:4], "labels": [-100, *row[1:4]]} for row in ROWS]))
    raise AssertionError(kind)


def their_loss(model: Path, batch: dict[str, Any]) -> float:
    causal_lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    given = {
        key: value for key, value in batch.items() if key in ("input_ids", "labels", "position_ids", "attention_mask")
    }
    return float(causal_lm(**given, use_cache=False).loss)


KINDS = ["language modeling", "default", "flattening", "flattening for kernels"]


def losses(model: str, batches: list[dict[str, Any]]) -> list[float]:
    """Return the loss of each batch without training: a new LoRA changes nothing."""
    told = []
    for batch in batches:
        module = PipeLiteModule(model, LoRA(rank=2), dtype="float32", lr=0.0)
        trainer = L.Trainer(
            strategy=PipeLiteStrategy(1), accelerator="cpu", devices=1, max_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader([batch], batch_size=None))
        told.append(float(trainer.callback_metrics["train/loss"]))
    return told


def test_losses_are_those_of_transformers(job: Path, workers: Workers) -> None:
    batches = [batch_of(kind, job / "model") for kind in KINDS]
    ours = workers.run(1, losses, str(job / "model"), batches)[0]
    theirs = [their_loss(job / "model", batch) for batch in batches]
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_both_forms_of_labels_come_to_the_same(job: Path) -> None:
    flat = FORM.complete(batch_of("flattening", job / "model"))
    assert flat["labels"].tolist() == [[9, 9, 30, 7, 8, 1, -100, 12, 13, 14, -100, 22, 23, 24, 25, 26, -100]]
    again = FORM.complete(flat)
    assert all(torch.equal(again[key], flat[key]) for key in flat)
    without_positions = {key: flat[key][:, :7] for key in ("input_ids", "labels")}
    told = FORM.complete(without_positions)
    assert told["labels"].tolist() == flat["labels"][:, :7].tolist()
    assert told["position_ids"].tolist() == [list(range(7))]
    # Labels that fit both forms hold the next token if there are positions, and the token itself if not.
    same = {"input_ids": torch.full((1, 4), 3), "labels": torch.full((1, 4), 3)}
    assert FORM.complete(same)["labels"].tolist() == [[3, 3, 3, -100]]
    with_positions = {**same, "position_ids": torch.arange(4)[None]}
    assert FORM.complete(with_positions)["labels"].tolist() == [[3, 3, 3, 3]]


def batch(**given: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[1, 2, 3, -100]])}
    return {key: value for key, value in {**made, **given}.items() if value is not None}


def tensor(*row: Any) -> torch.Tensor:
    return torch.tensor([row])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(1, 2), 3), "PipeLiteModule cannot train on batches of tuple: pass int64 tensors input_ids and"),
        (batch(labels=None), "cannot train on batches of input_ids: pass"),
        (batch(pixel_values=torch.ones(1, 3)), "does not support pixel_values in batches: leave it out"),
        (batch(seq_idx=tensor(0, 0, 0, 0)), "does not support seq_idx"),
        (batch(token_type_ids=tensor(0, 1, 0, 0)), "does not support token_type_ids other than 0"),
        (batch(input_ids=torch.tensor([1, 2])), "input_ids of a batch is int64 of shape (2,): pass"),
        (batch(labels=torch.ones(1, 4)), "labels of a batch is float32 of shape (1, 4): pass"),
        (batch(labels=torch.ones(1, 3).long()), "labels of a batch is int64 of shape (1, 3): pass"),
        (batch(position_ids=torch.arange(4)), "position_ids of a batch is int64 of shape (4,): pass"),
        (
            batch(input_ids=tensor(1, 2, 3, 320)),
            "the token 320, but the model's embedding has only 320 rows, for tokens 0 to 319",
        ),
        (batch(input_ids=tensor(1, -1, 3, 4)), "the token -1, but"),
        (batch(labels=tensor(1, 2, 3, 320)), "a batch has the label 320, but the model's head has only 320 rows"),
        (batch(labels=tensor(1, 2, 3, -1)), "a batch has the label -1, but"),
        (batch(attention_mask=tensor(0, 1, 1, 1)), "has a 0 before a 1: pad on the right"),
        (batch(attention_mask=tensor(1, 0, 1, 1)), "has a 0 before a 1"),
        (batch(attention_mask=tensor(1, 1, 2, 2)), "has values other than 0 and 1: separate documents by position_ids"),
        (batch(attention_mask=tensor(1, 1, 0, 0)), "a batch has labels for padding: set them to -100"),
        (batch(attention_mask=torch.ones(1, 1, 4, 4).long()), "attention_mask of a batch is int64 of shape (1, 1, 4"),
    ],
)
def test_what_is_wanted_is_said(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        FORM.complete(given)


def test_padding_that_would_count_in_the_loss_of_routers() -> None:
    padded = batch(attention_mask=tensor(1, 1, 1, 0), labels=tensor(1, 2, 3, -100))
    assert FORM.complete(padded)["labels"].tolist() == [[2, 3, -100, -100]]
    with pytest.raises(ConfigurationError, match="which would count in the loss of the model's routers"):
        BatchForm(320, 320, counts_padding=True).complete(padded)


def test_control_classes_belong_to_the_next_token() -> None:
    form = BatchForm(320, 320, ("control_classes",))
    given = batch(labels=tensor(2, 3, 4, -100), position_ids=tensor(0, 1, 2, 3), control_classes=tensor(1, 1, 1, 0))
    assert form.complete(given)["control_classes"].tolist() == [[1, 1, 1, 0]]
    with pytest.raises(ConfigurationError, match="labels of a batch with control_classes must hold the next token"):
        form.complete(batch())
    assert "control_classes" not in FORM.complete(given)


class Data(L.LightningDataModule):
    """Has a token that the model lacks."""

    def check_vocabulary(self, rows: int) -> None:
        raise ConfigurationError(f"more than {rows} rows")


def refusal(model: str) -> str:
    """Return the error of ``fit``, and whether weights were loaded before it."""
    module = PipeLiteModule(model, LoRA(rank=2), dtype="float32")
    trainer = L.Trainer(
        strategy=PipeLiteStrategy(1), accelerator="cpu", devices=1, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=Data())
    except ConfigurationError as error:
        return f"{error}, {hasattr(module, 'pipeline_stage')}"
    return "nothing"


def test_the_data_module_is_asked_before_weights_are_loaded(job: Path, workers: Workers) -> None:
    assert workers.run(1, refusal, str(job / "model"))[0] == "more than 320 rows, False"
