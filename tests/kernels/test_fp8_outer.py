"""Gradients computed from FP8 codes equal float64, natively and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from interpreter import INTERPRETED, pass_interpreted
from lightning_pipelite.kernels import fp8, fp8_outer
from lightning_pipelite.kernels.fp8_outer import DEPTH, outer_with_codes
from lightning_pipelite.kernels.fp8_rows import DTYPE, dequantise_rows, quantise_rows

ON_GPU = torch.cuda.is_available() and fp8.has_fp8(torch.device("cuda"))
DEVICE = "cuda" if ON_GPU else "cpu"
# Rows of u times scales are rounded, in bfloat16 by up to 2^-8 of their value. The interpreter cannot multiply
# bfloat16: it multiplies the bits.
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
if INTERPRETED:
    del ERRORS[torch.bfloat16]


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run natively")
def test_under_the_interpreter() -> None:
    pass_interpreted(__file__)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "few"), [(0, 16, 4), (1, 16, 1), (50, 48, 8), (9 * DEPTH - 1, 272, 5), (800, 144, 96)], ids=str
)
def test_sums_over_rows_of_very_different_size(rows: int, width: int, few: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, u = (torch.randn(rows, size, generator=generator).to(DEVICE) for size in (width, few))
    x *= 10 ** (6 * torch.rand(rows, 1, generator=generator) - 3).to(DEVICE)
    codes, scales = quantise_rows(x)
    u = u.to(dtype)
    found = outer_with_codes(u, codes, scales)
    assert found.dtype == torch.float32
    exact = dequantise_rows(codes, scales, torch.float64)
    sizes = u.double().abs().T @ exact.abs()
    assert ((found.double() - u.double().T @ exact).abs() <= ERRORS[dtype] * sizes).all()
    assert torch.equal(found, outer_with_codes(u, codes, scales))  # deterministic


@pytest.mark.parametrize(("rows", "width", "few"), [(8192, 8192, 768), (8192, 4096, 192), (4096, 4096, 48)], ids=str)
def test_partial_sums_take_little_memory(rows: int, width: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan does not count it."""
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(fp8_outer, "by_triton", lambda _: True)
    monkeypatch.setattr(fp8_outer, "launch", lambda kernel, grid, u, codes, scales, sums, *_, **__: taken.append(sums))
    u = torch.empty(rows, few, dtype=torch.bfloat16)
    outer_with_codes(u, torch.empty(rows, width, dtype=DTYPE), torch.empty(rows))
    assert taken[0].nbytes <= max(40e6, 8 * few * width)


def test_the_product_is_counted() -> None:
    codes = torch.empty(64, 32, device="meta", dtype=DTYPE)
    found = outer_with_codes(torch.empty(64, 8, device="meta", dtype=torch.bfloat16), codes, codes.new_empty(64))
    assert (found.shape, found.dtype) == ((8, 32), torch.float32)
