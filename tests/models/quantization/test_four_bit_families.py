"""4-bit weights equal those of bitsandbytes; benchmarks/four_bit.py covers more families."""

from __future__ import annotations

import pytest

import four_bit_families
from expert_memory import measure_peak


@pytest.mark.parametrize("model_type", ["qwen2", "cohere2", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_weights_are_bitsandbytes_and_the_rest_is_as_it_was(model_type: str) -> None:
    outcome = four_bit_families.try_family(model_type)
    assert outcome.wrong == []
    assert outcome.linear > 0
    assert bool(outcome.fused) == ("router" in outcome.kept)


def test_a_weight_that_is_not_the_reference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(four_bit_families.FAMILIES, "mixtral", "")  # then the routers are expected in 4 bits
    assert "mlp.gate.weight is not in 4 bits" in four_bit_families.try_family("mixtral").wrong[0]


@pytest.mark.slow
def test_one_layer_of_experts_at_a_time_is_held_in_full_precision() -> None:
    assert measure_peak(8) <= four_bit_families.PEAK_LIMIT
