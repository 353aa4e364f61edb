"""Training in stages equals a plain loop over the unsplit model: a subset of what benchmarks/exactness.py compares."""

from __future__ import annotations

import pytest

from exact_comparison import compare
from exact_training import CASES, LOSS_LIMIT, WEIGHT_LIMIT, Case, Scale, Split
from processes import Workers

SPLITS = {
    "full, untied": [Split(2, 2, True)],
    "full, tied": [Split(1), Split(4), Split(2, 2), Split(2, virtual_stages=2)],
    "LoRA, all layers": [Split(1, 2), Split(2, 2, virtual_stages=2)],
    "LoRA, first layer only": [Split(2)],
    "LoRA, last layer only": [Split(4)],
    "LoRA, 4-bit base": [Split(2), Split(2, virtual_stages=2)],
    "LoRA, FP8 base, dequantised": [Split(2, 2)],
    "full, experts and router loss": [Split(2, 2), Split(4), Split(2, virtual_stages=2)],
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_weights_are_those_of_a_plain_loop(workers: Workers, case: Case) -> None:
    for split, loss, weight in compare(workers, case, SPLITS[case.name], steps=8, scale=Scale(sequences=27)):
        assert loss <= LOSS_LIMIT, split
        assert weight <= WEIGHT_LIMIT, split
