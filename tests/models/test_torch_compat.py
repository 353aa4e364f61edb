"""Compiled code has the gradients of eager code, even with an autograd.Function that this project has not tested."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.variables.misc import AutogradFunctionVariable

from lightning_pipelite.kernels import fp8
from lightning_pipelite.kernels.fp8_rows import quantise_rows
from lightning_pipelite.models.memory import compile_layers
from lightning_pipelite.models.torch_compat import leave_functions_to_autograd


class ReturnsWhatItIsGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradient * y, gradient * x


def not_used(x: Tensor) -> Tensor:
    y = x * 1
    InPlace.apply(y)
    return y


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "returns what it is given": lambda x: ReturnsWhatItIsGiven.apply(x),
    "what it returns is not used": not_used,
    "the same tensor twice": lambda x: Product.apply(x, x),
}
EXPECTED = {"returns what it is given": 2.0, "what it returns is not used": 3.0, "the same tensor twice": 1.0}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(AutogradFunctionVariable, "call_apply", AutogradFunctionVariable.call_apply)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_gradient(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, str]:
    """Return the gradient at 0.5, and the code of the compiled graphs."""
    code = ""

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        nonlocal code
        code += graph.code
        return graph

    x = torch.full((3,), 0.5, requires_grad=True)
    result = torch.compile(lambda x: function(x.clone()).sum(), backend=backend)(x)
    return torch.autograd.grad(result, x)[0], code


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_right_with_this_version(name: str) -> None:
    compile_layers([])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compiled_gradient(FUNCTIONS[name])[0].tolist() == [EXPECTED[name]] * 3


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1"])
def test_an_untested_function_is_not_traced_by_former_versions(version: str) -> None:
    for _ in range(2):  # a second call is harmless
        leave_functions_to_autograd(version)
    with pytest.warns(UserWarning, match=r"wrong gradients of test_torch_compat\.Product.*install torch 2\.13"):
        gradient, code = compiled_gradient(lambda x: Product.apply(x, x.cos()))
    x = torch.tensor(0.5)
    torch.testing.assert_close(gradient, (x.cos() - x * x.sin()).expand(3))
    assert "clone" in code
    assert "autograd_function" not in code


def test_own_functions_are_traced_by_all_and_others_by_newer_versions() -> None:
    weight = quantise_rows(torch.eye(3))
    traced = AutogradFunctionVariable.call_apply
    leave_functions_to_autograd("2.13.0")
    assert AutogradFunctionVariable.call_apply is traced
    leave_functions_to_autograd("2.11.0")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch .* may compute wrong gradients")
        gradient, code = compiled_gradient(lambda x: fp8.fp8_linear(x[None], weight, None, in_fp8=False))
    assert gradient.tolist() == [1.0] * 3
    assert "autograd_function" in code
