"""Types of different build train exactly, or are refused; benchmarks/coverage.py tries all of transformers'."""

from __future__ import annotations

import pytest

import tiny_families


@pytest.mark.parametrize(
    ("model_type", "packing"),
    [
        ("mixtral", "isolated"),
        ("gpt_oss", "isolated"),  # its own masks know no documents
        ("gpt2", "isolated"),  # weights before the layers beside the embedding
        ("bert", "isolated"),  # a head of several parts with weights of its own
        ("gemma2", "isolated"),  # two caps, a scaled and tied embedding
        ("cohere2", "isolated"),  # parallel blocks
        ("deepseek_v4", "refused"),  # several streams, and layers that need the tokens
        ("roberta", "refused"),  # positions that do not start at 0
        ("mamba", "refused"),
    ],
)
def test_exact(model_type: str, packing: str) -> None:
    outcome = tiny_families.try_model(model_type)
    assert (outcome.result, outcome.packing) == ("exact", packing), outcome.note


@pytest.mark.parametrize(
    ("model_type", "word"),
    [("gemma3n_text", "what comes before"), ("inkling2_text", "what comes before"), ("xlnet", "later tokens")],
)
def test_refused_with_the_reason(model_type: str, word: str) -> None:
    outcome = tiny_families.try_model(model_type)
    assert outcome.result == "refused"
    assert word in outcome.note
