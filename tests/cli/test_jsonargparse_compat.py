"""Integers stay integers, in whichever order an import first created a union of int and float."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from lightning_pipelite.cli.fit_options import read_options
from lightning_pipelite.cli.jsonargparse_compat import take_integers_first


@pytest.mark.parametrize(("word", "kind"), [("1", int), ("1.0", float), ("0.5", float), ("3", int)])
def test_limits_are_batches_if_they_are_integers(word: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"]
    monkeypatch.setenv("PIPELITE_FIT__TRAINER__LIMIT_TEST_BATCHES", word)
    words = [f"--trainer.{name}={word}" for name in names if name != "limit_test_batches"]
    trainer = read_options(words, {})["trainer"]
    assert {name: type(trainer[name]) for name in names} == dict.fromkeys(names, kind)
    assert {float(trainer[name]) for name in names} == {float(word)}


def test_jsonargparse_still_goes_by_the_order() -> None:
    parser = ArgumentParser()
    parser.add_argument("--limit", type=float | int | None)
    assert parser.parse_args(["--limit=1"]).limit.__class__ is float  # once this fails, the workaround can be removed
    take_integers_first(parser)
    assert parser.parse_args(["--limit=1"]).limit.__class__ is int
    assert parser.parse_args(["--limit=1.0"]).limit.__class__ is float
    assert parser.parse_args(["--limit=null"]).limit is None
