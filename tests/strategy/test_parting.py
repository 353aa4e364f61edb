"""Stages whose data differ stop with the same message, in whichever step that happens, before weights change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_pipelite.strategy.agreement import _factor
from lightning_pipelite.strategy.micro_batches import all_shapes, described, fingerprint
from parting_jobs import add_up, fit_with, part
from processes import Workers

CPU = torch.device("cpu")
DIFFERENT = "the stages of a pipeline were given different micro-batches"


@pytest.mark.parametrize(
    ("kind", "said", "steps"),
    [
        ("a number drawn on one rank", f"{DIFFERENT} in step 3", 2),
        ("dataset that shuffles itself", f"{DIFFERENT} in step ", 0),
        ("sampler", f"{DIFFERENT} in step 1", 0),
        ("transform", f"{DIFFERENT} in step 1", 0),
        ("shape", f"{DIFFERENT} at epoch 0, the step up to micro-batch 6: rank 0 has ", 2),
        ("length", "the ranks have diverged: rank 0 is at epoch 0, before micro-batch 1 of 4, rank 1 at epoch 0, ", 0),
        ("unsized", "the ranks have diverged: rank 0 is at epoch 0", 1),
    ],
)
def test_every_way_to_part_in_training(workers: Workers, kind: str, said: str, steps: int) -> None:
    first, second = workers.run(2, part, kind, False, 2, 1)
    assert first["error"] == second["error"]
    assert first["error"] is not None
    assert first["error"].startswith(said)
    assert first["steps"] == second["steps"] == steps or kind == "dataset that shuffles itself"


@pytest.mark.parametrize("kind", ["sampler", "transform", "shape", "length"])
def test_every_way_to_part_in_an_evaluation(workers: Workers, kind: str) -> None:
    first, second = workers.run(2, part, kind, True, 2, 1)
    assert first["error"] == second["error"]
    assert first["error"] is not None
    assert first["error"].startswith((DIFFERENT, "the ranks have diverged"))
    assert "evaluation" in first["error"]


@pytest.mark.parametrize(("stages", "replicas"), [(2, 2), (3, 1)])
def test_all_ranks_are_told(workers: Workers, stages: int, replicas: int) -> None:
    told = workers.run(stages * replicas, part, "transform", False, stages, replicas)
    assert all(result == told[0] for result in told)
    assert told[0]["error"].startswith(f"{DIFFERENT} in step 1")


def test_data_that_is_the_same_is_trained_on(workers: Workers) -> None:
    for result in workers.run(2, part, "", False, 2, 1):
        assert result["error"] is None
        assert result["steps"] == 6


@pytest.mark.parametrize(
    ("options", "rates", "gammas", "said"),
    [
        ([{}, {}], [0.1, 0.2], [0.5, 0.5], "the optimizer's lr is not the same on all ranks: 0.1 on rank 0, 0.2 on"),
        ([{}, {}], [0.1, 0.1], [0.5, 0.4], "ExponentialLR's gamma is not the same on all ranks: 0.5 on rank 0, 0.4 on"),
        ([{"gradient_clip_val": 1.0}, {}], [0.1] * 2, [0.5] * 2, "trainer.gradient_clip_val is not the same on all "),
        ([{}, {"max_steps": 2}], [0.1] * 2, [0.5] * 2, "trainer.max_steps is not the same on all ranks: 1 on rank "),
        ([{}, {}], [0.1] * 2, [0.5] * 2, None),
    ],
)  # fmt: skip
def test_options_that_differ_between_ranks(workers: Workers, options: Any, rates: Any, gammas: Any, said: Any) -> None:
    first, second = workers.run(2, fit_with, options, rates, gammas)
    assert first == second
    assert first is None if said is None else first.startswith(said)


def test_fingerprints_tell_values_and_places() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randint(0, 1000, (4, 6), generator=generator), {"y": torch.randn(4, 3, generator=generator)})
    inputs, targets = batch[0], batch[1]["y"]
    changed = targets.clone()
    changed[2, 1] = changed[2, 1].nextafter(torch.tensor(9.0))
    turned = inputs.clone()
    turned[1] = turned[1].flip(0)
    others = [
        (inputs.flip(0), {"y": targets}), (turned, {"y": targets}), (inputs, {"y": changed}),
        (inputs, {"y": targets.T}), (inputs.T, {"y": targets}), (inputs, {"y": targets}, torch.tensor(True)),
        (inputs.int(), {"y": targets.bfloat16()}), (inputs, {"y": -targets}), ({"y": targets}, inputs),
        (inputs[:1], {"y": targets}),
    ]  # fmt: skip
    numbers = [float(fingerprint(item, CPU)) for item in (batch, *others)]
    assert len(set(numbers)) == len(numbers)
    assert all(number == int(number) and 0 <= number < 2**32 for number in numbers)
    again = (inputs.clone(), {"y": targets.T.contiguous().T})  # different strides, same values
    assert float(fingerprint(again, CPU)) == numbers[0]


def test_fingerprints_tell_micro_batches_that_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    permutations = [torch.randperm(64, generator=generator) for _ in range(8)]
    cases = [
        [(permutations[i], permutations[i + 1]) for i in range(0, 8, 2)],
        [(row, row) for row in torch.eye(4)],
        [(torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1]))] * 2,
    ]
    for micro_batches in cases:
        inputs, targets = zip(*micro_batches, strict=True)
        others = [
            micro_batches[::-1], micro_batches[1:] + micro_batches[:1], list(zip(targets, inputs, strict=True)),
            list(zip(inputs, targets[::-1], strict=True)), list(zip(inputs[::-1], targets, strict=True)),
            [(a.flip(0), b) for a, b in micro_batches], [(a, b.roll(1)) for a, b in micro_batches],
        ]  # fmt: skip
        number = fingerprint(micro_batches, CPU)
        for other in others:
            same = all(
                torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(micro_batches, other, strict=True)
            )
            assert (fingerprint(other, CPU) == number) == same


@pytest.mark.parametrize("places", [("step 3", "step 3"), ("step 3", "step 4"), ("step 3", None)], ids=str)
def test_numbers_are_added_up_at_the_same_place(workers: Workers, places: tuple[str, str | None]) -> None:
    first, second = workers.run(2, add_up, places)
    if places[0] == places[1]:
        assert first == second == [1.5, 6.0]
    else:
        said = f"the ranks have diverged: rank 0 is at step 3, rank 1 at {places[1] or 'epoch 0'};"
        assert first == second
        assert first.startswith(said)


def test_fingerprints_take_any_dtype_and_shape() -> None:
    items = [
        torch.tensor(2.5), torch.tensor(2.5).bfloat16(), torch.zeros(0, 3), torch.ones(2).bool(), torch.ones(3).half(),
        torch.ones(2, dtype=torch.complex64), torch.ones(2).double(), "words", None, 3,
    ]  # fmt: skip
    numbers = [float(fingerprint([item], CPU)) for item in items[:7]]
    assert len(set(numbers)) == 7
    assert float(fingerprint(items, CPU)) != float(fingerprint(items[1:], CPU))


def test_shapes_are_told_in_words() -> None:
    batch = ({"x": torch.zeros(2, 3), "n": 1}, torch.zeros(2).long())
    assert described(batch) == "({x: [2, 3] float32, n: 1}, [2] int64)"
    assert all_shapes([(torch.zeros(1), None)] * 2 + [batch]).startswith("2 of ([1] float32, None), 1 of ({x: ")
    assert all(sum(_factor(number, of) for number in range(of)) == 0 for of in range(1, 9))
