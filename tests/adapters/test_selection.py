from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lightning_pipelite.adapters.selection import match_modules, parse_layers, refuse_vectors
from lightning_pipelite.errors import ConfigurationError

NAMES = [
    f"model.layers.{i}.{m}"
    for i in range(12)
    for m in ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
] + ["model.embed_tokens", "lm_head"]


def test_ranges_are_inclusive_and_given_in_any_order() -> None:
    assert parse_layers("0:3, 7, 12:15", 16) == [0, 1, 2, 3, 7, 12, 13, 14, 15]
    assert parse_layers("7,0:1 ,1", 8) == [0, 1, 7]
    assert parse_layers([3, 1, 3], 4) == [1, 3]
    assert parse_layers(None, 3) == [0, 1, 2]


@given(st.lists(st.integers(0, 19), min_size=1))
def test_text_and_list_mean_the_same(numbers: list[int]) -> None:
    assert parse_layers(", ".join(map(str, numbers)), 20) == parse_layers(numbers, 20) == sorted(set(numbers))


@pytest.mark.parametrize(
    ("layers", "word"),
    [
        ("0:4", "4"),
        ("-1", "-1"),
        ("3:1", "3:1"),
        ("a", "a"),
        ("1:2:3", "1:2:3"),
        ("", "''"),
        ("0,,1", "''"),
        ([], "empty"),
        ([4], "4"),
        ([-1], "-1"),
        ([1.5], "1.5"),
        ([True], "True"),
    ],
)
def test_wrong_layers_are_named(layers: object, word: str) -> None:
    with pytest.raises(ConfigurationError, match="layers_to_transform.*" + re.escape(word)):
        parse_layers(layers, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["mlp.up_proj", "o_proj"], ["lm_head"], r".*\.1\..*_proj", ["layers.1.mlp.up_proj"]]
)
def test_matches_what_peft_matches(targets: str | list[str]) -> None:
    config = LoraConfig(target_modules=targets)
    assert match_modules(NAMES, targets) == [name for name in NAMES if check_target_module_exists(config, name)]


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj", "proj"], "(", []])
def test_a_target_without_a_match_is_an_error(targets: str | list[str]) -> None:
    with pytest.raises(ConfigurationError, match="target_modules"):
        match_modules(NAMES, targets)


SHAPES = {
    "model.layers.10.input_layernorm.weight": [8],
    "model.layers.2.input_layernorm.weight": [8],
    "model.layers.2.mlp.gate.weight": [4, 8],
    "model.layers.2.mlp.gate.bias": [4],
    "model.layers.2.norm.weight": [8],
    "model.layers.10.norm.weight": [8, 8],
    "model.layers.2.q_norm.scale": [8],
}


def test_a_target_of_vectors_alone_is_told_by_the_first() -> None:
    for targets in (["gate", "input_layernorm"], ["layers.2.input_layernorm"]):
        with pytest.raises(
            ConfigurationError, match=r"matches model\.layers\.2\.input_layernorm, which has no matrix; "
        ):
            refuse_vectors(SHAPES, targets)


@pytest.mark.parametrize("targets", [["gate"], ["norm"], ["q_norm"], ["layernorm"], ".*input_layernorm", []], ids=str)
def test_what_may_have_a_matrix_is_left_alone(targets: str | list[str]) -> None:
    refuse_vectors(SHAPES, targets)
