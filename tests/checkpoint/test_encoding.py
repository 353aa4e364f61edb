"""The Trainer's state, encoded as JSON and tensors."""

from __future__ import annotations

import collections
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.seed import _collect_rng_states

from lightning_pipelite.checkpoint.encoding import decode, encode
from lightning_pipelite.errors import ConfigurationError


def there_and_back(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    return decode(json.loads(json.dumps(encode(value, tensors), allow_nan=False)), tensors)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 2**80, 0.1, -math.inf, "text", "$tensor", [1, [2.5]], (1, (2, "b"), []), {1, 2}, frozenset("ab"),
        {"a": {"b": (1,)}}, {"$dict": 1}, {1: "a", (2, 3): None}, {"$a": 1, "b": 2}, torch.float16, torch.Size([2, 3]),
        torch.device("cpu"), Path("a/b"), collections.Counter({5: 2}),
    ],
)  # fmt: skip
def test_values_come_back_with_their_types(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)


def test_tensors_arrays_and_nan_come_back() -> None:
    value = {
        "a": [torch.ones(2, dtype=torch.bfloat16), torch.tensor(3)],
        "b": (np.arange(3, dtype=np.uint32), math.nan),
    }
    back = there_and_back(value)
    torch.testing.assert_close(back["a"], value["a"], atol=0, rtol=0)
    assert back["b"][0].dtype == np.uint32
    assert np.array_equal(back["b"][0], np.arange(3))
    assert math.isnan(back["b"][1])


def test_generators_go_on_where_they_were() -> None:
    from lightning.fabric.utilities.seed import _set_rng_states

    states = there_and_back(_collect_rng_states(include_cuda=False))
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    _set_rng_states(states)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == drawn


def test_what_cannot_be_encoded_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot hold callbacks\.Mine\.hook\[1\], a builtins\.function: use"):
        encode({"callbacks": {"Mine": {"hook": [0, lambda: None]}}}, {})


def test_hyper_parameters_are_information() -> None:
    back = there_and_back({"hyper_parameters": {"kind": torch.nn.ReLU, "width": 3}})
    assert back == {"hyper_parameters": {"kind": repr(torch.nn.ReLU), "width": 3}}


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="a value of type \\$call"):
        decode({"a": {"$call": ["os.system", "true"]}}, {})


def test_a_tensor_of_another_stage_is_told_as_such() -> None:
    with pytest.raises(ConfigurationError, match="average, a tensor of a layer on another process"):
        encode({"average": torch.ones(2, device="meta")}, {}, "callbacks.Own")
