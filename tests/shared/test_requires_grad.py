"""Compiled modules whose parameters were frozen or unfrozen: from Python 3.12 on, torch alone fails these tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pipelite.shared.requires_grad import RequiresGradWatch


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("first", "second")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["second"](self.parts["first"](x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_is_thawed_has_gradients_and_what_is_frozen_has_none(backend: str) -> None:
    layers = nn.ModuleList([Layer(), Layer()])
    for layer in layers:
        layer.compile(backend=backend)
    watch = RequiresGradWatch(layers)
    for number in range(8):
        for layer in layers:
            layer.parts["first"].weight.requires_grad_(number % 4 > 1)  # each for two steps
            layer.parts["second"].weight.requires_grad_(number % 2 > 0 or number > 4)
        layers.zero_grad()
        watch.look()
        x = torch.randn(3, 4, requires_grad=True)
        layers[1](layers[0](x)).square().sum().backward()
        for name, parameter in layers.named_parameters():
            has_one = parameter.grad is not None and bool(parameter.grad.any())
            assert has_one == parameter.requires_grad, (number, name)


def test_what_has_changed_alone_is_put_in_anew() -> None:
    class Noting(dict[str, nn.Parameter | None]):
        def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
            written.append(name)
            super().__setitem__(name, value)

    layer, written = Layer(), list[str]()
    for name, part in layer.parts.items():
        part._parameters = Noting({name: part.weight})
    watch = RequiresGradWatch(layer)
    watch.look()
    assert written == ["first", "first", "second", "second"]  # an earlier training may have compiled them
    watch.look()
    layer.parts["second"]._parameters["second"].requires_grad_(False)  # type: ignore[union-attr]
    watch.look()
    assert written[4:] == ["second", "second"]
    assert all(parameter is not None for part in layer.parts.values() for parameter in part._parameters.values())
