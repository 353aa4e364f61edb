"""Training in two stages equals a plain loop for several families; benchmarks/families.py tries twenty."""

from __future__ import annotations

import pytest

import family_training
from exact_training import LOSS_LIMIT, WEIGHT_LIMIT
from processes import Workers


@pytest.mark.parametrize(
    ("model_type", "way"), [("gemma2", 0), ("gpt_oss", 0), ("deepseek_v3", 1), ("lfm2", 1), ("gemma3n_text", 1)]
)
def test_losses_and_weights_are_those_of_a_plain_loop(workers: Workers, model_type: str, way: int) -> None:
    loss, weight = family_training.try_family(workers, model_type, family_training.modes(model_type)[way], steps=4)
    assert loss <= LOSS_LIMIT
    assert weight <= WEIGHT_LIMIT
