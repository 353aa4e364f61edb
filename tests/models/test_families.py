"""A small part of benchmarks/families.py."""

from __future__ import annotations

import pytest

import families
from exactness import LOSS_LIMIT, WEIGHT_LIMIT
from processes import Workers


@pytest.mark.parametrize(("model_type", "way"), [("gemma2", 0), ("gpt_oss", 0), ("deepseek_v3", 1)])
def test_losses_and_weights_are_those_of_a_plain_loop(workers: Workers, model_type: str, way: int) -> None:
    loss, weight = families.try_family(workers, model_type, families.modes(model_type)[way], steps=4)
    assert loss <= LOSS_LIMIT
    assert weight <= WEIGHT_LIMIT
