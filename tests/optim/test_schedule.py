from __future__ import annotations

import math
import warnings

import pytest
import torch
from optimi import Adam

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.module.optimization import Optimization
from lightning_pipelite.optim import check_schedule, make_schedule, rms_ratio
from lightning_pipelite.optim.schedule import rise_of


def rates(schedule: str, warmup: int, total: float, steps: int, optimizer: type = Adam) -> list[list[float]]:
    """Return the learning rates of two groups in each step."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    made = optimizer([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}], lr=0.1)
    scheduler = make_schedule(made, schedule, warmup, total)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in made.param_groups])
        weights[0].grad = torch.ones(1)
        made.step()
        scheduler.step()
    return found


def as_an_average(step: int, beta: float) -> float:
    """Return the limit deviation of Adam's mean of uncorrelated numbers, relative to that after ``step`` numbers."""

    def deviation(count: int) -> float:
        weights = [(1 - beta) * beta**age for age in range(count)]
        return math.sqrt(sum(weight**2 for weight in weights)) / sum(weights)

    return deviation(5000) / deviation(step)


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999])
def test_rms_ratio_is_that_of_deviations(beta: float) -> None:
    assert [rms_ratio(t, beta) for t in (1, 2, 10, 1000)] == pytest.approx(
        [as_an_average(t, beta) for t in (1, 2, 10, 1000)], rel=1e-2 if beta > 0.99 else 1e-9
    )
    assert rms_ratio(1, 0.99) == pytest.approx(0.0708881, abs=1e-6)


def test_constant() -> None:
    found = rates("constant", 4, math.inf, 6)
    assert [a for a, _ in found] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert [b for _, b in found] == pytest.approx([5 * a for a, _ in found])
    assert [a for a, _ in rates("constant", 0, math.inf, 2)] == [0.1, 0.1]


def test_cosine() -> None:
    found = [a for a, _ in rates("cosine", 2, 10, 10)]
    expected = [0.05, 0.1, *(0.05 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]
    assert found == pytest.approx(expected)
    assert 0 < found[-1] < 0.005
    assert [a for a, _ in rates("cosine", 0, 4, 6)][-2:] == [0, 0]
    assert [a for a, _ in rates("cosine", 2, 3, 4)] == [0.05, 0.1, 0.1, 0]  # a single step after the warm-up


def test_rms_ratio_takes_the_optimizers_beta() -> None:
    found = rates("rms_ratio", 0, math.inf, 300)  # optimi's beta2 is 0.99
    assert [a for a, _ in found] == pytest.approx([0.1 * as_an_average(t, 0.99) for t in range(1, 301)])
    assert [b for _, b in found] == pytest.approx([5 * a for a, _ in found])
    assert [a for a, _ in rates("rms_ratio", 0, math.inf, 3, torch.optim.AdamW)] == pytest.approx(
        [0.1 * as_an_average(t, 0.999) for t in (1, 2, 3)],
        rel=1e-2,  # torch's beta2 is 0.999
    )
    with pytest.raises(ConfigurationError, match=r"SGD.*constant or cosine"):
        rates("rms_ratio", 0, math.inf, 1, torch.optim.SGD)


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (3, math.inf)])
def test_cosine_needs_an_end(warmup: int, total: float) -> None:
    with pytest.raises(ConfigurationError, match="max_steps"):
        rates("cosine", warmup, total, 1)


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 0), ("rms_ratio", 5), ("constant", -1)])
def test_wrong_options(schedule: str, warmup: int) -> None:
    with pytest.raises(ConfigurationError, match="model"):
        check_schedule(schedule, warmup)


@pytest.mark.parametrize(("schedule", "warmup"), [("rms_ratio", 0), ("constant", 0), ("constant", 5), ("cosine", 1)])
def test_right_options(schedule: str, warmup: int) -> None:
    check_schedule(schedule, warmup)


def test_rise() -> None:
    half, most = rise_of("rms_ratio", 0, 0.99)
    assert rms_ratio(half - 1, 0.99) < 0.5 <= rms_ratio(half, 0.99)
    assert rms_ratio(most - 1, 0.99) < 0.9 <= rms_ratio(most, 0.99)
    assert rise_of("constant", 10, 0.99) == (5, 10)


def test_a_training_shorter_than_the_rise_is_told() -> None:
    short = Optimization(None, 1e-3, (0.9, 0.99), 1e-6, "rms_ratio", 0, {})
    with pytest.warns(UserWarning, match="has 30 steps, .* half of the learning rate at step 51 and .* at step 225"):
        short.warn_of_length(30)
    warmed = Optimization(None, 1e-3, (0.9, 0.99), 1e-6, "constant", 10, {})
    with pytest.warns(
        UserWarning, match=r"has 7 steps, but model.warmup_steps is 10: the learning rate reaches only 0\.7 of"
    ):
        warmed.warn_of_length(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.warn_of_length(1000)
        Optimization(None, 1e-3, (0.9, 0.99), 1e-6, "constant", 10, {}).warn_of_length(30)
