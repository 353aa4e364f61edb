"""Which options count as the same on all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.same_options import comparable, require_same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0), ((0.9, 0.99), [0.9, 0.99]), ({1: 2, 3: 4}, {3: 4, 1: 2}), (math.nan, math.nan), (None, None),
        ({"a": (1, {"b": 2.0})}, {"a": [1.0, {"b": 2}]}),
    ],
)  # fmt: skip
def test_what_is_equal_is_the_same(one: Any, other: Any) -> None:
    require_same([{"the optimizer's lr": one}, {"the optimizer's lr": other}, {}])


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("the optimizer's lr", 1e-3, 2e-3), ("the optimizer's lr", 1, True), ("the optimizer's betas", (0.9,), (0.8,)),
        ("trainer.max_steps", 1, 2), ("trainer.limit_train_batches", 1, 1.0), ("trainer.val_check_interval", 1, 1.0),
        ("trainer.gradient_clip_val", None, 0), ("x", "1", 1),
    ],
)  # fmt: skip
def test_what_differs_is_named(name: str, one: Any, other: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is not the same on all ranks: .* on rank 0, .* on rank 1"):
        require_same([{name: one}, {name: other}])


def test_objects_of_a_process_are_not_compared() -> None:
    options = {"lr": 0.1, "f": lambda: 0, "o": object(), "t": torch.ones(2), "b": (torch.ones(1), 2), "s": {"a", "b"}}
    assert comparable(options) == {"lr": 0.1}
