"""Model types of varied structure train exactly or are refused; benchmarks/coverage.py tries all of transformers."""

from __future__ import annotations

import pytest

import tiny_families


@pytest.mark.parametrize(
    ("model_type", "packing"),
    [
        ("mixtral", "isolated"),
        ("gpt_oss", "isolated"),  # its own masks ignore documents
        ("gpt2", "isolated"),  # weights before the layers other than the embedding
        ("bert", "isolated"),  # a head of several modules with weights
        ("gemma2", "isolated"),  # two caps, a scaled and tied embedding
        ("cohere2", "isolated"),  # parallel blocks
        ("deepseek_v4", "isolated"),  # several streams, and layers that need the tokens
        ("gemma3n_text", "isolated"),  # several streams, per-layer inputs, keys and values of another layer
        ("gemma4_text", "isolated"),
        ("zamba2", "isolated"),  # weights that layers share, and the embedded tokens beside the hidden states
        ("roberta", "refused"),  # positions that do not start at 0
        ("mamba", "isolated"),  # its layers run on each document separately
    ],
)
def test_exact(model_type: str, packing: str) -> None:
    outcome = tiny_families.try_model(model_type)
    assert (outcome.result, outcome.packing) == ("exact", packing), outcome.note


@pytest.mark.parametrize(
    ("model_type", "word"),
    [("zaya", "each other's state"), ("inkling2_text", "values computed before"), ("roformer", "sizes only")],
)
def test_what_cannot_be_cut_is_exact_in_one_stage(model_type: str, word: str) -> None:
    outcome = tiny_families.try_model(model_type)
    assert (outcome.result, outcome.stages) == ("exact", "1"), outcome.note
    assert word in outcome.note


def test_refused_with_the_reason() -> None:
    outcome = tiny_families.try_model("xlnet")
    assert outcome.result == "refused"
    assert "later tokens" in outcome.note


@pytest.mark.parametrize(("name", "layers"), [("Gemma 3n E4B", 12), ("Jamba 1.5 Mini", 6), ("Qwen3 30B-A3B", 2)])
def test_published_models_train_through_peft_and_in_four_bits(name: str, layers: int) -> None:
    """Weights that a model uses directly, as Gemma 3n clamps some and Jamba multiplies by one, are not quantised."""
    outcome = tiny_families.try_published(name, layers)
    assert (outcome.result, outcome.lora, outcome.four_bit) == ("exact", "equal", "equal"), outcome.note
