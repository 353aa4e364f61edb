"""Norms and clipping of a stage match torch's; missing or non-finite gradients raise an error that names them."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from lightning_pipelite.strategy.gradient_check import GradientCheck, require_gradients
from lightning_pipelite.strategy.gradients import clip_factor, gradient_norms, scale_gradients

CPU = torch.device("cpu")


def stage(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return layers whose parameters all have gradients, except for the last bias."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    for number, parameter in enumerate(layers.parameters()):
        parameter.grad = torch.randn_like(parameter) * 3**number if number < 3 else None
    return layers


def gradients(layers: nn.Module) -> list[Tensor]:
    return [p.grad for p in layers.parameters() if p.grad is not None]


def test_norms_are_those_of_all_gradients_as_one_vector() -> None:
    layers = stage()
    found = gradient_norms(layers.parameters(), None, CPU)
    assert len(found.parameters) == 3
    torch.testing.assert_close(found.each, torch.stack([g.square().sum().sqrt() for g in gradients(layers)]))
    torch.testing.assert_close(found.total, torch.cat([g.flatten() for g in gradients(layers)]).norm())
    assert found.total.dtype == torch.float32


def test_the_norm_of_a_stage_without_gradients_is_zero() -> None:
    found = gradient_norms([nn.Parameter(torch.ones(3))], None, CPU)
    assert (found.parameters, found.each.tolist(), float(found.total)) == ([], [], 0.0)


def test_norms_of_bfloat16_are_summed_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.1)
    found = gradient_norms([parameter], None, CPU)
    assert float(found.total) == pytest.approx(64 * float(torch.tensor(0.1, dtype=torch.bfloat16)), rel=1e-5)


def test_the_norm_is_finite_if_each_gradient_is() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.full((1,), 1.5e38)  # its square overflows float32
    assert float(gradient_norms(parameters, None, CPU).total) == pytest.approx(1.5e38 * math.sqrt(2))


@pytest.mark.parametrize("limit", [0.1, 7.0, 1e3])
def test_clipping_is_torchs(limit: float) -> None:
    layers, reference = stage(), stage()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), limit)
    total = gradient_norms(layers.parameters(), None, CPU).total
    scale_gradients(layers.parameters(), clip_factor(total, limit))
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(gradients(layers), gradients(reference), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [0.0, 1e-6, 3e-6])
def test_tiny_norms_are_clipped_as_torch_does(norm: float) -> None:
    reference = nn.Parameter(torch.zeros(1))
    reference.grad = torch.full((1,), norm)
    nn.utils.clip_grad_norm_([reference], 1e-6)
    assert norm * float(clip_factor(torch.tensor(norm), 1e-6)) == pytest.approx(float(reference.grad), rel=1e-5)


@pytest.mark.parametrize(
    ("layers", "told"),
    [(1, "0.weight, 0.bias in the first step"), (2, "0.weight, 0.bias, 1.weight and 1 more in the first step")],
)
def test_what_no_gradient_reached_is_named(layers: int, told: str) -> None:
    stages = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
    with pytest.raises(RuntimeError, match=re.escape(f"stage 3: no gradient reached {told}")):
        require_gradients(stages, 3)
    require_gradients(stages.requires_grad_(False), 3)
    for parameter in stages.requires_grad_(True).parameters():
        parameter.grad = torch.zeros_like(parameter)
    require_gradients(stages, 3)


def test_three_without_gradients_are_all_named() -> None:
    layers = stage()
    layers.zero_grad()
    layers[1].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"reached 0\.weight, 0\.bias, 1\.weight in the first step"):
        require_gradients(layers, 0)


def test_finite_gradients_go_on() -> None:
    layers = stage()
    norms = gradient_norms(layers.parameters(), None, CPU)
    GradientCheck(layers, None).require_finite(1, norms, norms.total)


def test_gradients_that_are_not_finite_are_named() -> None:
    layers = stage()
    gradients(layers)[1][2] = float("inf")
    norms = gradient_norms(layers.parameters(), None, CPU)
    with pytest.raises(
        RuntimeError, match=r"step 4: the loss is finite, but .* gradients is inf, due to .*0\.bias"
    ) as told:
        GradientCheck(layers, None).require_finite(4, norms, norms.total)
    assert re.findall(r"\d+\.(?:weight|bias)", str(told.value)) == ["0.bias"]


def test_clipping_that_makes_them_not_finite_is_told() -> None:
    layers = stage()
    norms = gradient_norms(layers.parameters(), None, CPU)
    scale_gradients(layers[0].parameters(), float("nan"))
    with pytest.raises(RuntimeError, match=r"step 2: clipping has made the norm .* nan, due to .*0\.weight.*0\.bias"):
        GradientCheck(layers, None).require_finite(2, norms, gradient_norms(layers.parameters(), None, CPU).total)
