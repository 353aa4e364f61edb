"""Rows become FP8 codes and scales: in plain torch, by the kernel, and in a compiled layer, on every device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interpreter import INTERPRETED, pass_interpreted
from lightning_pipelite.kernels import fp8, fp8_rows
from lightning_pipelite.kernels.fp8_rows import (
    DTYPE,
    LARGEST,
    SMALLEST,
    WIDEST,
    cast_rows,
    dequantise_rows,
    quantise_rows,
)

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
def test_what_codes_can_express_is_exact(width: int, multiplied: bool) -> None:
    """The interpreter rounds into FP8 wrongly, so these are codes already, times a power of two for each row."""
    generator = torch.Generator().manual_seed(width)
    exact = torch.randint(0, 0x7F, (5, width), generator=generator, dtype=torch.uint8).view(DTYPE).float()
    exact *= 2.0 * torch.randint(0, 2, exact.shape, generator=generator) - 1
    exact[:, -1], exact[3] = -LARGEST, 0.0
    powers = 2.0 ** torch.tensor([[-60.0], [-3.0], [0.0], [5.0], [60.0]])
    by = 2.0 ** torch.randint(-3, 4, (width,), generator=generator) if multiplied else None
    x = exact * powers if by is None else exact * powers / by
    device = DEVICES[-1]
    codes, scales = cast_rows(x.to(device), None if by is None else by.to(device))
    assert torch.equal(codes.cpu().float(), exact)
    assert torch.equal(scales.cpu(), torch.where(exact.any(1), powers.flatten(), SMALLEST / LARGEST))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("width", [16, WIDEST + 16])
def test_what_is_not_finite_does_not_pass_for_a_number(value: float, width: int) -> None:
    x = torch.ones(4, width, device=DEVICES[-1])
    x[1, 3], x[2, -1] = value, value
    numbers = dequantise_rows(*cast_rows(x), torch.float32)
    assert numbers[1:3].isnan().all()
    assert torch.equal(numbers[[0, 3]], x[[0, 3]])


@pytest.mark.parametrize("multiplied", [False, True])
def test_torchs_own_checks_of_the_operation(multiplied: bool) -> None:
    x, by = torch.randn(3, WIDEST + 16), torch.rand(WIDEST + 16) if multiplied else None
    # Without the schema check, which does arithmetic on FP8 values that CPUs do not support.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.pipelite.fp8_cast_rows.default, (x, by), test_utils=checks)


def test_the_planner_allocates_codes_and_scales_alone() -> None:
    codes, scales = fp8_rows.cast_operation(torch.empty(2, 3, WIDEST + 16, device="meta"), None)
    assert (codes.shape, codes.dtype) == ((2, 3, WIDEST + 16), DTYPE)
    assert (scales.shape, scales.dtype) == ((6,), torch.float32)
