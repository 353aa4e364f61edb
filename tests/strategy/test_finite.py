"""Non-finite values never reach the weights or the disk, and all ranks stop with the same message."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from exact_training import Case as ModelCase
from exact_training import Scale, make_model
from finite_jobs import Case, save_lora_not_finite, save_not_finite, spoil
from lightning_pipelite.shared.finite import in_words, not_finite
from processes import Workers

NORM = "step 3: the loss is finite, but the norm of the gradients is {}, due to those of {}; training stops before the"
SPOILED = "0.0.weight, 0.0.bias, 1.0.weight and 1 more (stage 0)"
CASES = {
    "nan": (Case(math.nan), "nan", SPOILED),
    "nan, clipped": (Case(math.nan, clip=0.1), "nan", SPOILED),
    "norm": (Case(1e30), "inf", SPOILED),
    "norm, clipped": (Case(1e30, clip=0.1), "inf", SPOILED),
    "infinite": (Case(1.0, infinite="4.bias"), "inf", "4.bias (stage {})"),
    "infinite, clipped": (Case(1.0, infinite="4.bias", clip=0.1), "inf", "4.bias (stage {})"),
    "nan, clipped by value": (Case(math.nan, clip=0.1, algorithm="value"), "nan", SPOILED),
    "infinite, by value": (Case(1.0, infinite="4.bias", clip=0.1, algorithm="value"), "inf", "4.bias (stage {})"),
    "infinite, by infinity": (Case(1.0, infinite="4.bias", clip=math.inf), "inf", "4.bias (stage {})"),
}


@pytest.mark.parametrize(("stages", "replicas", "number"), [(1, 1, 9), (2, 1, 9), (4, 1, 2), (1, 2, 2), (2, 2, 2)])
def test_gradients_that_are_not_finite_stop_before_the_weights_change(
    workers: Workers, stages: int, replicas: int, number: int
) -> None:
    """NaN, gradients whose norm overflows float32, and infinity in one parameter; unclipped, and with each clipping."""
    cases = dict(list(CASES.items())[:number])
    ranks = workers.run(stages * replicas, spoil, [case for case, *_ in cases.values()], stages, replicas)
    for (name, (_, norm, spoiled)), result in zip(cases.items(), ranks[0], strict=True):
        assert result["error"] is not None, name
        assert result["error"].startswith(NORM.format(norm, spoiled.format(stages - 1))), name
    for told in ranks:
        assert told == ranks[0]
        assert all(result["untouched"] and result["step"] == 2 for result in told)


def test_a_stage_with_nothing_to_train_stops_as_well(workers: Workers) -> None:
    for case, expected in (
        (Case(math.nan, clip=0.1, frozen=(2, 3)), SPOILED),
        (Case(math.nan, frozen=(0,)), "1.0.weight, 1.0.bias (stage 0)"),
    ):
        first, second = workers.run(2, spoil, [case], 2, 1)
        assert first == second
        assert first[0]["error"].startswith(NORM.format("nan", expected))
        assert first[0]["untouched"]


@pytest.mark.parametrize("stages", [1, 2])
def test_what_clipping_makes_infinite_stops_as_well(workers: Workers, stages: int) -> None:
    cases = [Case(1.0, own_clipping=math.inf), Case(1.0, own_clipping=math.nan)]
    ranks = workers.run(stages, spoil, cases, stages, 1)
    assert all(told == ranks[0] for told in ranks)
    for result in ranks[0]:
        assert result["error"].startswith("step 3: clipping has made the norm of the gradients ")
        assert (result["untouched"], result["step"]) == (True, 2)


def test_what_clipping_can_mend_is_trained_on(workers: Workers) -> None:
    cases = [Case(1e15, clip=0.1), Case(1.0, clip=math.inf), Case(1e15, own_clipping=1e-15)]
    for result in workers.run(1, spoil, cases, 1, 1)[0]:
        assert result["error"] is None
        assert result["step"] == 4


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("where", "name"), [("weights", "3.weight"), ("state", "optimizer/3.weight/momentum_buffer")])
def test_checkpoints_refuse_what_is_not_finite(
    workers: Workers, tmp_path: Path, stages: int, where: str, name: str
) -> None:
    for error, files in workers.run(stages, save_not_finite, where, str(tmp_path), stages):
        assert error.startswith(f"the checkpoint {tmp_path}/3.ckpt is not written, because")
        assert f"{name} (stage {stages - 1})" in error
        assert files == ["2.ckpt"]


@pytest.mark.parametrize("stages", [1, 2])
def test_what_was_trained_is_not_saved_if_it_is_not_finite(workers: Workers, tmp_path: Path, stages: int) -> None:
    make_model(tmp_path / "base", ModelCase("tied", tied=True), Scale())
    out = tmp_path / "out"
    for by_hand, at_the_end in workers.run(stages, save_lora_not_finite, str(tmp_path / "base"), str(out), stages):
        assert by_hand.startswith(f"{out / 'by hand'} is not written, because it would hold values that are nan or")
        assert at_the_end.startswith(f"{out / 'adapter'} is not written")
        assert "layers.1." in at_the_end
        assert "(stage 0)" in at_the_end
    assert not [*out.glob("*")]


def test_names_of_what_is_not_finite() -> None:
    inf = torch.tensor([1.0, -torch.inf])
    tensors = {
        "half": inf.half(), "bf16": torch.tensor([[torch.nan]]).bfloat16(), "double": inf.double(),
        "integers": torch.arange(3), "empty": torch.zeros(0), "scalar": torch.tensor(torch.nan),
        "largest": torch.full((3,), torch.finfo(torch.float32).max), "meta": torch.empty(3, device="meta"),
    }  # fmt: skip
    assert not_finite(tensors) == ["half", "bf16", "double", "scalar"]
    assert not_finite({}) == []
    assert in_words([["a"], [], ["b", "c", "d", "e", "f"]]) == "a (stage 0); b, c, d and 2 more (stage 2)"
