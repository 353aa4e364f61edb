"""Rows become FP8 codes and scales: in plain torch, by the kernel, and in a compiled layer, on every device."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from interpreter import INTERPRETED, pass_interpreted
from lightning_pipelite.kernels import fp8, fp8_lora
from lightning_pipelite.kernels.device import is_traced
from lightning_pipelite.kernels.fp8 import fp8_linear
from lightning_pipelite.kernels.fp8_rows import (
    DTYPE,
    LARGEST,
    SMALLEST,
    WIDEST,
    cast_now,
    cast_rows,
    dequantise_rows,
    quantise_rows,
)
from lightning_pipelite.kernels.lora import lora_linear

ON_GPU = torch.cuda.is_available() and fp8.has_fp8(torch.device("cuda"))
DEVICES = ["cpu", *(["cuda"] if ON_GPU else [])]
UNIT = 2.0**-4  # half a unit in the last place of a code, relative to its value


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run natively")
def test_under_the_interpreter() -> None:
    pass_interpreted(__file__)


def rows_of_very_different_size(width: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3, 50, width, generator=generator)
    x *= 10 ** (12 * (torch.rand(3, 50, 1, generator=generator) - 0.5))
    x = x.to(dtype)
    x[0, 0], x[0, 1], x[0, 2] = 0, torch.finfo(dtype).max, 1e-37
    return x.to(device)


def check(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Each value may be off by half a unit in the last place of its code, or of the smallest codes."""
    assert (codes.shape, codes.dtype) == (x.shape, DTYPE)
    assert (scales.shape, scales.dtype) == ((150,), torch.float32)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    found, x = dequantise_rows(codes.flatten(0, -2), scales, torch.float64).view(x.shape), x.double()
    assert not found[0, 0].any()
    largest = x.abs().amax(-1, keepdim=True)
    allowed = torch.maximum(UNIT * x.abs(), largest.clamp_min(SMALLEST) / LARGEST * 2.0**-10) * (1 + 1e-5)
    assert ((found - x).abs() <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_of_rows_of_very_different_size(device: str, dtype: torch.dtype) -> None:
    x = rows_of_very_different_size(64, dtype, device)
    check(x, *quantise_rows(x))


def test_the_largest_of_a_row_has_the_largest_code_and_zeros_have_a_scale() -> None:
    codes, scales = quantise_rows(torch.tensor([[1.5, -3.0], [0.0, 0.0], [2.0**-90, 0.0]]))
    torch.testing.assert_close(scales, torch.tensor([3.0, 2.0**-100, 2.0**-90]) / 448, rtol=0, atol=0)
    assert codes.float().tolist() == [[224.0, -448.0], [0.0, 0.0], [448.0, 0.0]]


WIDE = [WIDEST + 16, 2 * WIDEST + 16, 5 * WIDEST]


if not INTERPRETED:  # the interpreter rounds into FP8 wrongly

    @pytest.mark.gpu
    @pytest.mark.skipif(not ON_GPU, reason="needs a GPU with FP8")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("width", WIDE)
    @pytest.mark.parametrize("multiplied", [False, True])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_wide_rows_on_a_gpu(width: int, dtype: torch.dtype, multiplied: bool, compiled: bool) -> None:
        x = rows_of_very_different_size(width, dtype, "cuda")
        by = torch.rand(width, device="cuda") + 0.5 if multiplied else None
        torch.compiler.reset()  # so that no case counts as a recompilation of another
        function = torch.compile(cast_rows, fullgraph=True) if compiled else cast_rows
        x[1, 0] /= 8  # so that by does not make it overflow
        if by is not None:
            x[0, 1] /= 8
        codes, scales = function(x, by)
        check(x if by is None else x.double() * by.double(), codes, scales)
        torch.testing.assert_close(scales, quantise_rows(x, by)[1], rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("width", WIDE)
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_what_codes_can_express_is_exact(width: int, multiplied: bool, parts: int) -> None:
    """The interpreter rounds into FP8 wrongly, so these are codes already, times a power of two for each row."""
    generator = torch.Generator().manual_seed(width)
    exact = torch.randint(0, 0x7F, (5, width), generator=generator, dtype=torch.uint8).view(DTYPE).float()
    exact *= 2.0 * torch.randint(0, 2, exact.shape, generator=generator) - 1
    exact[:, -1], exact[3] = -LARGEST, 0.0
    powers = 2.0 ** torch.tensor([[-60.0], [-3.0], [0.0], [5.0], [60.0]])
    by = 2.0 ** torch.randint(-3, 4, (width,), generator=generator) if multiplied else None
    x = exact * powers if by is None else exact * powers / by
    device = DEVICES[-1]
    cuts = [0, *sorted(torch.randperm(width - 1, generator=generator)[: parts - 1].add(1).tolist()), width]
    columns = [x[:, start:stop].to(device) for start, stop in itertools.pairwise(cuts)]
    by = None if by is None else by.to(device)
    codes, scales = cast_rows(columns[0], by) if parts == 1 else cast_now(columns, by)
    assert torch.equal(codes.cpu().float(), exact)
    assert torch.equal(scales.cpu(), torch.where(exact.any(1), powers.flatten(), SMALLEST / LARGEST))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("width", [16, WIDEST + 16])
def test_what_is_not_finite_does_not_pass_for_a_number(value: float, width: int) -> None:
    x = torch.ones(4, width, device=DEVICES[-1])
    x[1, 3], x[2, -1] = value, value
    for parts in (1, 2, 3):
        found = cast_rows(x) if parts == 1 else cast_now(x.tensor_split(parts, dim=1))
        numbers = dequantise_rows(*found, torch.float32)
        assert numbers[1:3].isnan().all()
        assert torch.equal(numbers[[0, 3]], x[[0, 3]])


@pytest.mark.parametrize("multiplied", [False, True])
def test_torchs_own_checks_of_the_operation(multiplied: bool) -> None:
    x, by = torch.randn(3, WIDEST + 16), torch.rand(WIDEST + 16) if multiplied else None
    # Without the schema check, which does arithmetic on FP8 values that CPUs do not support.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.pipelite.fp8_cast_rows.default, (x, by), test_utils=checks)


def test_one_graph_casts_any_number_of_rows() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: cast_rows(x * 2), backend=counter, dynamic=True)
    for rows in (3, 5, 7):
        x = torch.randn(2, rows, WIDEST + 16)
        assert all(map(torch.equal, map(bits, compiled(x)), map(bits, cast_rows(x * 2))))
    assert counter.frame_count == 1


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def outcomes(function: Any, device: str, outputs: int) -> list[Tensor]:
    """Compute two FP8 layers of which each has wide rows: as its output's gradient, and as its input."""
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if device == "cuda" else torch.float32
    wide, narrow = (
        [part.to(device) for part in quantise_rows(torch.randn(*shape, generator=generator) / 8)]
        for shape in ((outputs, 64), (64, outputs))
    )
    x, g = (torch.randn(2, 7, 64, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    a, b = (torch.randn(*shape, generator=generator).to(device).requires_grad_() for shape in ((4, 64), (outputs, 4)))
    given = [x, a, b]
    result = function(x, a, b, wide, narrow)
    return [result.detach(), *torch.autograd.grad(result, given, g.detach())]


@pytest.mark.parametrize("device", DEVICES)
def test_layers_with_wide_rows_compute_the_same_when_compiled(device: str) -> None:
    def layers(x: Tensor, a: Tensor, b: Tensor, wide: list[Tensor], narrow: list[Tensor]) -> Tensor:
        (inner,) = lora_linear(x, [wide], [a], [b], [None], [0.5], in_fp8=True)
        return fp8_linear(inner.tanh(), narrow, None, in_fp8=True)

    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager_decomp_partition"
    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    for found, wanted in zip(*(outcomes(each, device, WIDEST + 16) for each in (compiled, layers)), strict=True):
        error = (found - wanted).float().norm() / wanted.float().norm()
        assert error < (1e-2 if device == "cuda" else 1e-6)


def test_aot_autograd_is_not_taken_for_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """It traces the gradients of lora_linear, and cannot launch a kernel on what it traces with."""
    of_gradients = []

    def cast(x: Tensor, by: Tensor) -> list[Tensor]:
        of_gradients.append(is_traced(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)))  # type: ignore[arg-type]
        return quantise_rows(x, by)

    monkeypatch.setattr(fp8_lora, "cast_rows", cast)  # there, of gradients alone
    torch.compiler.reset()
    weight = quantise_rows(torch.randn(32, 16))
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((3, 16), (4, 16), (32, 4)))

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, [weight], [a], [b], [None], [1.0], in_fp8=True)[0]

    torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)(x).sum().backward()
    assert of_gradients == [False]
