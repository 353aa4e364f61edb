from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from optimi import Adam
from torch import nn

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.optim import check_patterns, group_parameters, make_optimizer

NAMES = ("q.lora_A.weight", "q.lora_B.weight", "q.base.weight", "norm.weight")


def named() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(1), requires_grad="base" not in name)) for name in NAMES]


def test_the_first_pattern_counts_and_every_group_is_there() -> None:
    parameters = named()
    patterns: dict[str, Any] = {"lora_B": {"lr": 1.0}, r"lora_|norm": {"weight_decay": 0.5}, "nothing": {"lr": 2.0}}
    groups = group_parameters(parameters, patterns)
    numbers = {id(p): index for index, (_, p) in enumerate(parameters)}
    assert [[numbers[id(p)] for p in group["params"]] for group in groups] == [[], [1], [0, 3], []]
    optimizer = make_optimizer(torch.optim.AdamW, 0.1, groups, patterns)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0, 0.1, 2.0]
    assert optimizer.param_groups[2]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("patterns", "word"), [({"(": {"lr": 1.0}}, "regular expression"), ({"lora_B": {}}, "no options")]
)
def test_wrong_patterns(patterns: Any, word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        check_patterns(patterns)


def test_right_patterns() -> None:
    check_patterns({"lora_B": {"lr": 1.0}, r"lora_|norm": {"weight_decay": 0.0}})


@pytest.mark.parametrize("factory", [Adam, torch.optim.AdamW])
def test_an_option_that_the_optimizer_does_not_know(factory: Any) -> None:
    patterns: dict[str, Any] = {"lora_B": {"momentum": 1.0}}
    with pytest.raises(ConfigurationError, match=r"lora_B sets momentum.*lr"):
        make_optimizer(factory, 0.1, group_parameters(named(), patterns), patterns)


def test_a_value_that_the_optimizer_refuses() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.optimizer.*beta"):
        make_optimizer(partial(torch.optim.AdamW, betas=(2.0, 0.9)), 0.1, group_parameters(named(), {}), {})
