"""FP8 products equal float64 on the dequantised values. On a CPU, the same steps run in float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_pipelite.kernels import fp8, lora, low_rank_sum
from lightning_pipelite.kernels.fp8 import fp8_linear, fp8_linear_reference, transposed
from lightning_pipelite.kernels.fp8_rows import DTYPE, dequantise_rows, quantise_rows
from lightning_pipelite.kernels.lora import lora_linear, lora_linear_reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and fp8.has_fp8(torch.device("cuda")) else [])]
UNIT = 2.0**-4  # half a unit in the last place of a code, relative to its value
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


def draw(*shape: int, seed: int = 0, device: str = "cpu", spread: float = 0.0) -> Tensor:
    """Draw normal numbers; with a ``spread``, rows differ in size by up to that many powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if spread:
        values *= 10 ** (spread * (torch.rand(*shape[:-1], 1, generator=generator) - 0.5))
    return values.to(device)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the largest relative error of a row."""
    wanted = wanted.detach()
    error = (found.detach().double() - wanted).flatten(0, -2).norm(dim=1)
    return float((error / wanted.flatten(0, -2).norm(dim=1).clamp_min(1e-300)).max())


def error_of_products(found: Tensor, wanted: Tensor, left: Tensor, right: Tensor) -> float:
    """Return the largest error beyond the result's rounding, relative to the sum of the products' magnitudes.

    Each factor may be off by half a unit in its last place. The rounding is that of the result, which a bias may make
    much larger than the products.
    """
    sizes, wanted = left.double().abs() @ right.double().abs(), wanted.detach()
    error = (found.detach().double() - wanted).abs() - ROUNDING[found.dtype] * wanted.abs()
    return float((error / sizes).max())


def stands_for(codes: Tensor, scales: Tensor) -> Tensor:
    return dequantise_rows(codes.flatten(0, -2), scales, torch.float64).view(codes.shape)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_does_not_pass_for_a_number(value: float) -> None:
    x = draw(4, 32)
    x[1, 3] = value
    weight = quantise_rows(draw(16, 32, seed=1))
    result = fp8_linear(x, weight, None, in_fp8=True)
    assert result[1].isnan().all()
    assert result[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(16, 32), (128, 128), (48, 400), (272, 16)], ids=str)
def test_transposed(device: str, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    assert torch.equal(transposed(codes.view(DTYPE)).view(torch.uint8), codes.T)


@pytest.mark.parametrize("device", DEVICES)
def test_given_transposed_codes_may_be_columns_of_a_larger_weight(device: str) -> None:
    weights = [quantise_rows(draw(size, 64, seed=size, device=device, spread=6)) for size in (48, 32, 16)]
    cached, start = transposed(torch.cat([codes.view(torch.uint8) for codes, _ in weights]).view(DTYPE)), 0
    for codes, scales in weights:
        rows = quantise_rows(draw(18, codes.shape[0], device=device, spread=6).to(torch.bfloat16), scales)
        with_cache = [codes, scales, cached.narrow(1, start, codes.shape[0])]
        found, wanted = (
            fp8.product(rows, weight, torch.bfloat16, back=True) for weight in (with_cache, [codes, scales])
        )
        assert torch.equal(found, wanted)
        start += codes.shape[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_in_fp8(device: str, biased: bool) -> None:
    """Both products equal those of the dequantised values in every row, however much rows of g and W differ in size."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, g = (draw(2, 9, width, seed=width, device=device, spread=6).to(dtype) for width in (64, 48))
    codes, scales = quantise_rows(draw(48, 64, seed=5, device=device, spread=6))
    bias = draw(48, seed=6, device=device).to(dtype) if biased else None
    x.requires_grad_()
    result = fp8_linear(x, [codes, scales], bias, in_fp8=True)
    (of_x,) = torch.autograd.grad(result, x, g)
    whole = stands_for(codes, scales)
    wanted = linear(stands_for(*quantise_rows(x.detach())), whole, None if bias is None else bias.double())
    assert relative(result, wanted) < ROUNDING[dtype]
    of_wanted = stands_for(*quantise_rows(g, scales)) @ codes.double()
    assert relative(of_x, of_wanted) < ROUNDING[dtype]
    # Against unquantised x and g, both are right up to the error of FP8, relative to each row's own size.
    exact = linear(x.double(), whole, None if bias is None else bias.double())
    assert error_of_products(result, exact, x.detach(), whole.T) < UNIT
    assert error_of_products(of_x, g.double() @ whole, g, whole) < UNIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_with_dequantised_weights(dtype: torch.dtype) -> None:
    x, bias, g = draw(2, 9, 40).to(dtype), draw(24, seed=1).to(dtype), draw(2, 9, 24, seed=2).to(dtype)
    weight = quantise_rows(draw(24, 40, seed=3))
    outcomes = []
    ours = partial(fp8_linear, in_fp8=False)
    for convert, function in ((Tensor.clone, ours), (Tensor.double, fp8_linear_reference)):
        leaf = convert(x).requires_grad_()
        result = function(leaf, weight, convert(bias))
        outcomes.append([result, *torch.autograd.grad(result, leaf, convert(g))])
    for found, wanted in zip(*outcomes, strict=True):
        assert found.dtype == dtype
        assert relative(found, wanted) < ROUNDING[dtype]


def join(weights: list[list[Tensor]]) -> list[Tensor]:
    """Concatenate several weights into one."""
    codes, scales = zip(*weights, strict=True)
    return [torch.cat([each.view(torch.uint8) for each in codes]).view(DTYPE), torch.cat(scales)]


class Projections:
    """Several FP8 projections of one input, with adapters."""

    outputs, ranks = (32, 16, 48), (4, 4, 3)

    def __init__(self, device: str, *, joined: bool = False) -> None:
        self.scales = (0.5, 0.5, 0.5) if joined else (1.0, 0.5, 2.0)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        each = list(zip(self.outputs, self.ranks, strict=True))
        self.x = draw(2, 7, 64, device=device, spread=2).to(self.dtype)
        self.weights = [quantise_rows(draw(o, 64, seed=o, device=device, spread=3) / 8) for o in self.outputs]
        self.a = [draw(r, 64, seed=9 + n, device=device) / 8 for n, (_, r) in enumerate(each)]
        self.b = [draw(o, r, seed=19 + n, device=device) / 2 for n, (o, r) in enumerate(each)]
        self.given = [join(self.weights)] if joined else self.weights
        self.biases = [draw(32, seed=29, device=device).to(self.dtype), None, None]
        self.back = [draw(2, 7, o, seed=o + 1, device=device, spread=6).to(self.dtype) for o in self.outputs]

    def run(self, function: Any, weights: Any, convert: Any, **options: Any) -> list[Tensor]:
        x, *ab = (convert(t).requires_grad_() for t in (self.x, *self.a, *self.b))
        biases = [None if bias is None else convert(bias) for bias in self.biases]
        outputs = function(x, weights, ab[:3], ab[3:], biases, self.scales, **options)
        total = sum((output * convert(g)).sum() for output, g in zip(outputs, self.back, strict=True))
        return [*outputs, *torch.autograd.grad(total, [x, *ab])]

    def wanted(self) -> list[Tensor]:
        """Compute in float64 with dequantised values. A's gradient is that for x's codes; B's involves no FP8."""
        x, seen = self.x.double(), stands_for(*quantise_rows(self.x))
        outputs, of_x, of_a, of_b = [], torch.zeros_like(x), [], []
        given = zip(self.weights, self.a, self.b, self.biases, self.back, self.scales, strict=True)
        for weight, a, b, bias, g, scale in given:
            a, b = (each.to(self.dtype).double() for each in (a, b))
            output = linear(seen, stands_for(*weight)) + scale * x @ a.T @ b.T
            outputs.append(output if bias is None else output + bias.double())
            back = scale * g.double() @ b
            of_x += back @ a
            if len(self.given) > 1:
                of_x += stands_for(*quantise_rows(g, weight[1])) @ weight[0].double()
            of_a.append(back.flatten(0, -2).T @ seen.flatten(0, -2))
            of_b.append(scale * g.double().flatten(0, -2).T @ (x @ a.T).flatten(0, -2))
        if len(self.given) == 1:
            codes, scales = self.given[0]
            of_x += stands_for(*quantise_rows(torch.cat(self.back, dim=-1), scales)) @ codes.double()
        return [*outputs, of_x, *of_a, *of_b]


KINDS = ["apart", "joined", "joined and wide"]
IN_FP8 = [(False, "apart"), *((True, kind) for kind in KINDS)]


@pytest.fixture
def joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tell whether projections are joined; have outputs of any width computed as wide ones are, if they are wide."""
    if request.param == "joined and wide":
        monkeypatch.setattr(lora, "WIDEST", 0)
        monkeypatch.setattr(low_rank_sum, "NARROW", 0)
        torch.compiler.reset()
    return bool(request.param != "apart")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("joined", KINDS, indirect=True)
def test_projections_in_fp8(device: str, joined: bool) -> None:
    case = Projections(device, joined=joined)
    found = case.run(lora_linear, case.given, Tensor.clone, in_fp8=True)
    assert [t.dtype for t in found] == [case.dtype] * 4 + [torch.float32] * 6
    for number, (ours, exact) in enumerate(zip(found, case.wanted(), strict=True)):
        assert relative(ours, exact) < 2 * ROUNDING[case.dtype], number
    # The gradient of x is right up to the error of FP8, relative to each row's own size, however much the projections'
    # gradients and weights differ.
    left, whole = torch.cat(case.back, dim=-1), torch.cat([stands_for(*weight) for weight in case.weights])
    exact = left.double() @ whole
    for scale, g, a, b in zip(case.scales, case.back, case.a, case.b, strict=True):
        exact += scale * g.double() @ b.to(case.dtype).double() @ a.to(case.dtype).double()
    assert error_of_products(found[3], exact, left, whole) < UNIT


@pytest.mark.parametrize("joined", KINDS[1:], indirect=True)
def test_joined_projections_compute_what_they_do_apart(joined: bool) -> None:
    """Except for x's gradient, for which they share one scale per token, so it only agrees up to FP8's error."""
    case = Projections("cpu", joined=joined)
    outcomes = [case.run(lora_linear, each, Tensor.clone, in_fp8=True) for each in (case.given, case.weights)]
    for number, (joined, apart) in enumerate(zip(*outcomes, strict=True)):
        assert relative(joined, apart.double()) < (UNIT if number == 3 else 1e-6), number
        assert joined.shape == apart.shape
        assert number > 2 or joined.is_contiguous()


@pytest.mark.parametrize("joined", KINDS[1:], indirect=True)
def test_outputs_of_joined_projections_may_be_viewed_and_changed_in_place(joined: bool) -> None:
    case = Projections("cpu", joined=joined)
    b = [each.requires_grad_() for each in case.b]
    for x in (case.x, case.x[0], case.x[0, :1]):
        gradients = []
        for change in (lambda t: 2.0 * (t + 1.0), lambda t: t.add_(1.0).mul_(2.0).view(-1)):
            outputs = lora_linear(x, case.given, case.a, b, case.biases, case.scales, in_fp8=True)
            gradients.append(torch.autograd.grad(sum(change(output).sum() for output in outputs), b))
        for found, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(found, wanted)


def test_projections_with_dequantised_weights() -> None:
    case = Projections("cpu")
    found = case.run(lora_linear, case.weights, Tensor.clone, in_fp8=False)
    wanted = case.run(lora_linear_reference, [stands_for(*w) for w in case.weights], Tensor.double)
    for number, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
        assert relative(ours, exact) < 1e-6, number


@pytest.mark.parametrize(("in_fp8", "joined"), IN_FP8, indirect=["joined"])
def test_an_unused_output_and_no_tokens(in_fp8: bool, joined: bool) -> None:
    case = Projections("cpu", joined=joined)
    x = case.x.clone().requires_grad_()
    lora_linear(x, case.given, case.a, case.b, case.biases, case.scales, in_fp8=in_fp8)[1].sum().backward()
    wanted = torch.ones(2, 7, 16).double() @ (stands_for(*case.weights[1]) + 0.5 * (case.b[1] @ case.a[1]).double())
    assert x.grad is not None
    assert relative(x.grad, wanted) < (UNIT if in_fp8 else 1e-6)
    nothing = torch.empty(2, 0, 64, requires_grad=True)
    outputs = lora_linear(nothing, case.given, case.a, case.b, case.biases, case.scales, in_fp8=in_fp8)
    sum(output.sum() for output in outputs).backward()
    assert [output.shape for output in outputs] == [(2, 0, out) for out in case.outputs]
    assert nothing.grad is not None
    assert nothing.grad.shape == nothing.shape


@pytest.mark.parametrize("joined", KINDS, indirect=True)
def test_with_dropout_the_given_projections_have_their_gradients(joined: bool) -> None:
    case = Projections("cpu", joined=joined)

    def given(x: Any, weights: Any, a: Any, b: Any, biases: Any, scales: Any, **options: Any) -> list[Tensor]:
        return lora_linear(x, weights, a, b, biases, scales, [x @ down.T for down in a], **options)

    found = case.run(given, case.given, Tensor.clone, in_fp8=True)
    wanted = case.wanted()
    exact_of_a = case.run(lora_linear_reference, [stands_for(*w) for w in case.weights], Tensor.double)[4:7]
    for number, (ours, exact) in enumerate(zip(found, [*wanted[:4], *exact_of_a, *wanted[7:]], strict=True)):
        assert relative(ours, exact) < 1e-6, number


@pytest.mark.parametrize(("in_fp8", "joined"), IN_FP8, indirect=["joined"])
def test_compiled_layers_are_one_graph(in_fp8: bool, joined: bool) -> None:
    case = Projections("cpu", joined=joined)

    def run(function: Any) -> list[Tensor]:
        def both(x: Any, *arguments: Any, **options: Any) -> list[Tensor]:
            return function(fp8_linear(x, weight, None, in_fp8=in_fp8).tanh(), *arguments, **options)

        return case.run(both, case.given, Tensor.clone, in_fp8=in_fp8)

    weight = quantise_rows(draw(64, 64, seed=77) / 8)
    compiled = torch.compile(lora_linear, backend="aot_eager_decomp_partition", fullgraph=True)
    for found, wanted in zip(run(compiled), run(lora_linear), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_torchs_own_checks_of_the_operation(in_fp8: bool) -> None:
    weight, x, g = quantise_rows(draw(32, 16)), draw(2, 5, 16), draw(2, 5, 32)
    operation = torch.ops.pipelite.fp8_product.default
    forward, back = (quantise_rows(x), quantise_rows(g, weight[1])) if in_fp8 else ([x], [g])
    # Without the schema check, which does arithmetic on FP8 values that CPUs do not support.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operation, (forward, weight, draw(32), False, torch.float32), test_utils=checks)
    torch.library.opcheck(operation, (back, weight, None, True, torch.float32), test_utils=checks)
