from __future__ import annotations

import math

import pytest

from lightning_pipelite.module.evaluation_metrics import Evaluation


def test_one_set() -> None:
    evaluation = Evaluation(["text"])
    for _ in range(2):
        assert evaluation.add(6.0, 3.0) == {"eval/loss": 2.0, "eval/perplexity": pytest.approx(math.exp(2))}


def test_several_sets_weigh_by_their_tokens() -> None:
    evaluation = Evaluation(["a", "b"])
    assert evaluation.add(6.0, 3.0) == {"eval/loss/a": 2.0}
    assert evaluation.add(9.0, 1.0) == {
        "eval/loss/b": 9.0, "eval/loss": 3.75, "eval/perplexity": pytest.approx(math.exp(3.75)),
    }  # fmt: skip


def test_no_tokens_and_a_huge_loss_are_no_errors() -> None:
    assert math.isnan(Evaluation(["a"]).add(0.0, 0.0)["eval/loss"])
    assert Evaluation(["a"]).add(1e6, 1.0)["eval/perplexity"] == math.inf
