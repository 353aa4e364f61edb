from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from lightning_pipelite.kernels.lora import lora_linear, lora_linear_reference
from lightning_pipelite.kernels.lora_operands import Operands

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OUTPUTS, RANKS, SCALES = (24, 8, 40), (4, 4, 3), (1.0, 0.5, 2.0)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}  # half a unit, for a few roundings


class Case:
    """Random projections of one input, which run in their own dtype or in float64."""

    def __init__(
        self, device: str, dtype: torch.dtype, shape: tuple[int, ...] = (2, 7, 64), biased: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        self.x = draw(*shape).to(dtype)
        self.weights = [(draw(out, shape[-1]) / 8).to(dtype) for out in OUTPUTS]
        self.a = [draw(rank, shape[-1]) / 8 for rank in RANKS]
        self.b = [draw(out, rank) / 2 for out, rank in zip(OUTPUTS, RANKS, strict=True)]
        self.biases: list[Tensor | None] = [draw(out).to(dtype) if biased else None for out in OUTPUTS[:-1]] + [None]
        self.back = [draw(*shape[:-1], out).to(dtype) for out in OUTPUTS]

    def run(self, function: Any, weights: Any, exact: bool, used: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
        """Return the outputs, and the gradients of x, A and B."""
        convert = (lambda t: t.double()) if exact else (lambda t: t.clone())
        x, *ab = (convert(t).requires_grad_() for t in (self.x, *self.a, *self.b))
        a, b = ab[: len(self.a)], ab[len(self.a) :]
        biases = [None if bias is None else convert(bias) for bias in self.biases]
        outputs = function(x, weights, a, b, biases, SCALES)
        total = sum((outputs[i] * convert(self.back[i])).sum() for i in used)
        gradients = torch.autograd.grad(total, [x, *ab], allow_unused=True)
        return [*outputs, *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, (x, *ab), strict=True))]


class InFourBits(Case):
    """The same with weights in nf4, held separately or as one."""

    def __init__(self, device: str, nested: bool, *, as_one: bool = False) -> None:
        super().__init__(device, torch.float32)
        self.parts, stand_for = [], []
        for weight in [torch.cat(self.weights)] if as_one else self.weights:
            codes, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
            stand_for.append(dequantize_4bit(codes, state))
            scales = [state.state2.absmax, state.state2.code, state.offset] if nested else []
            self.parts.append([codes, state.absmax, *scales])
        self.stand_for = torch.cat(stand_for).split([len(weight) for weight in self.weights])


def with_projections(x: Any, weights: Any, a: Any, b: Any, biases: Any, scales: Any) -> list[Tensor]:
    return lora_linear(x, weights, a, b, biases, scales, [3.0 * (x @ down.T) for down in a])


def with_one_scale(function: Any) -> Any:
    return lambda x, weights, a, b, biases, _, *more: function(x, weights, a, b, biases, (0.5, 0.5, 0.5), *more)


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm()) if wanted.any() else float(found.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 64), (1, 1, 64), (513, 64)], ids=str)
def test_equals_float64(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    case = Case(device, dtype, shape)
    wanted = case.run(lora_linear_reference, [w.double() for w in case.weights], exact=True)
    found = case.run(lora_linear, [[w] for w in case.weights], exact=False)
    assert [t.dtype for t in found] == [dtype] * 4 + [torch.float32] * 6
    for number, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
        assert relative(ours, exact) < ROUNDING[dtype], number


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_weights(device: str, nested: bool) -> None:
    case = InFourBits(device, nested)
    wanted = case.run(lora_linear_reference, [weight.double() for weight in case.stand_for], exact=True)
    for ours, exact in zip(case.run(lora_linear, case.parts, exact=False), wanted, strict=True):
        assert relative(ours, exact) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=str)
def test_four_bit_weights_as_one(device: str, nested: bool, used: tuple[int, ...]) -> None:
    case = InFourBits(device, nested, as_one=True)
    whole = [weight.double() for weight in case.stand_for]
    wanted = case.run(with_one_scale(lora_linear_reference), whole, exact=True, used=used)
    found = case.run(with_one_scale(lora_linear), case.parts, exact=False, used=used)
    for number, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
        assert relative(ours, exact) < 1e-6, number
        assert ours.shape == exact.shape


@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_weights_as_one_with_given_projections(nested: bool) -> None:
    case = InFourBits("cpu", nested, as_one=True)
    wanted = case.run(
        lambda x, w, a, b, biases, s: lora_linear_reference(x, w, a, b, biases, [1.5] * 3),
        [weight.double() for weight in case.stand_for], exact=True,
    )  # fmt: skip
    found = case.run(with_one_scale(with_projections), case.parts, exact=False)
    for ours, exact in zip(found, wanted, strict=True):
        assert relative(ours, exact) < 1e-6


def test_four_bit_weights_as_one_are_compiled_into_one_graph() -> None:
    case = InFourBits("cpu", nested=True, as_one=True)
    compiled = torch.compile(lora_linear, backend="aot_eager_decomp_partition", fullgraph=True)
    for ours, eager in zip(
        *(case.run(with_one_scale(each), case.parts, exact=False) for each in (compiled, lora_linear)), strict=True
    ):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_an_unused_output_adds_nothing(device: str) -> None:
    case = Case(device, torch.float32)
    wanted = case.run(lora_linear_reference, [w.double() for w in case.weights], exact=True, used=(1,))
    found = case.run(lora_linear, [[w] for w in case.weights], exact=False, used=(1,))
    for ours, exact in zip(found, wanted, strict=True):
        assert relative(ours, exact) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_given_projections(device: str) -> None:
    case = Case(device, torch.float32)
    wanted = case.run(
        lambda x, w, a, b, biases, s: lora_linear_reference(x, w, a, b, biases, [3 * each for each in s]),
        [w.double() for w in case.weights], exact=True,
    )  # fmt: skip
    for ours, exact in zip(case.run(with_projections, [[w] for w in case.weights], exact=False), wanted, strict=True):
        assert relative(ours, exact) < 1e-6


def test_non_contiguous_input_and_no_gradient_of_it() -> None:
    case = Case("cpu", torch.float32, biased=False)
    x = torch.randn(64, 5).T
    arguments = (case.a, case.b, case.biases, SCALES)
    found = lora_linear(x, [[w] for w in case.weights], *arguments)
    for ours, exact in zip(found, lora_linear_reference(x, case.weights, *arguments), strict=True):
        torch.testing.assert_close(ours, exact)
    case.b[0].requires_grad_()
    lora_linear(x, [[w] for w in case.weights], *arguments)[0].sum().backward()
    assert case.b[0].grad is not None


def test_outputs_may_be_changed_in_place() -> None:
    case = Case("cpu", torch.float32)
    a, b = ([each.requires_grad_() for each in weights] for weights in (case.a, case.b))
    for x in (case.x, case.x[0]):
        output = lora_linear(x, [[weight] for weight in case.weights], a, b, case.biases, SCALES)[0]
        (expected,) = torch.autograd.grad(output.sum(), b[:1])
        output = lora_linear(x, [[weight] for weight in case.weights], a, b, case.biases, SCALES)[0]
        (found,) = torch.autograd.grad(output.add_(1.0).mul_(2.0).sum(), b[:1])
        torch.testing.assert_close(found, 2 * expected)


def test_no_tokens() -> None:
    case = Case("cpu", torch.float32)
    x = torch.empty(2, 0, 64, requires_grad=True)
    outputs = lora_linear(x, [[w] for w in case.weights], case.a, case.b, case.biases, SCALES)
    assert [output.shape for output in outputs] == [(2, 0, out) for out in OUTPUTS]
    sum(output.sum() for output in outputs).backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("given", [False, True])
def test_torchs_own_checks_of_the_operation(given: bool) -> None:
    case = Case("cpu", torch.float32)
    x, *ab = (t.clone().requires_grad_() for t in (case.x, *case.a, *case.b))
    projected = [(case.x @ down.T).requires_grad_() for down in case.a] if given else None
    opchecked, operation = [], torch.ops.pipelite.differentiable_lora_linear

    class Operations:
        lora_linear = torch.ops.pipelite.lora_linear

        def differentiable_lora_linear(self, *arguments: Any) -> Any:
            opchecked.append(arguments)
            return operation(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "pipelite", Operations())
        lora_linear(x, [[w] for w in case.weights], ab[:3], ab[3:], case.biases, SCALES, projected)
    torch.library.opcheck(operation.default, opchecked[0])
    x, codes, _, *operands = opchecked[0]
    torch.library.opcheck(Operations.lora_linear.default, (x.detach(), codes, *operands))
    # Compiled code calls this operation, without going through autograd's Python.
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("pipelite::lora_linear", "AutogradCPU")


def test_the_gradient_of_a_transposed_input_has_the_strides_that_the_compiler_is_told() -> None:
    x, weight, up = torch.randn(64, 14).T, torch.randn(24, 64), torch.randn(24, 4)
    operands = Operands([], [torch.randn(14, 4)], [up], [[weight]], [[]], [], [1.0])
    of_x, *_ = torch.ops.pipelite.lora_linear_backward([torch.randn(14, 24)], [], x, *operands.flat(), True)
    assert of_x.is_contiguous()
