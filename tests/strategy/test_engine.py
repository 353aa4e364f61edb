"""The engine matches a plain torch loop over the whole model in losses, gradient norms, weights and evaluation."""

from __future__ import annotations

import re

import pytest
import torch

from processes import Workers
from stage_jobs import hand_on, train, train_plainly
from stage_models import MODELS, build


def splits() -> list[tuple[str, int, int]]:
    cases = []
    for name in MODELS:
        model = build(name)
        cases += [(name, s, r) for s in model.stages for r in model.replicas if s * r <= 4]
    return cases


@pytest.mark.parametrize(("name", "stages", "replicas"), splits())
def test_training_equals_plain_torch(workers: Workers, name: str, stages: int, replicas: int) -> None:
    results = workers.run(stages * replicas, train, name, stages, replicas)
    ours, plain = results[0], train_plainly(name, replicas)
    exact = name != "dtypes"  # a sum of bf16 products depends on its order
    assert ours["losses"] == pytest.approx(plain["losses"], abs=1e-6 if exact else 1e-3)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-5 if exact else 1e-2)
    assert ours["eval"] == pytest.approx(plain["eval"], abs=1e-6 if exact else 2e-3)
    assert ours["weights"].keys() == plain["weights"].keys()
    if exact:
        torch.testing.assert_close(ours["weights"], plain["weights"], atol=2e-6, rtol=1e-5)
    for other in results[1:]:
        assert (other["losses"], other["norms"], other["eval"]) == (ours["losses"], ours["norms"], ours["eval"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("equal", "handed on"),
        ("turned", "handed on"),
        ("other shapes", "RuntimeError: stage 0 outputs .* may only depend on the shapes of the micro-batch"),
        ("other dtypes", "RuntimeError: stage 0 outputs .* may only depend on the shapes of the micro-batch"),
        ("a dictionary", "ConfigurationError: stage 0 ends with a layer that returns a dict"),
    ],
)
def test_what_cannot_be_handed_on_is_told(workers: Workers, kind: str, expected: str) -> None:
    assert re.match(expected, workers.run(1, hand_on, kind)[0])
