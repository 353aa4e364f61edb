"""Sums of wide matrices and thin products equal float64, natively and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interpreter import INTERPRETED, pass_interpreted
from lightning_pipelite.kernels import low_rank_sum
from lightning_pipelite.kernels.device import by_triton
from lightning_pipelite.kernels.low_rank_sum import NARROW, add_low_rank, low_rank_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot multiply bfloat16: it multiplies the bits.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run natively")
def test_under_the_interpreter() -> None:
    pass_interpreted(__file__)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(found: Tensor, base: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """The product is summed in float32; the sum is rounded once."""
    exact = base.double() + scale * left.double() @ right.double()
    unit = torch.finfo(found.dtype).eps
    sizes = base.double().abs() + abs(scale) * left.double().abs() @ right.double().abs()
    assert ((found.double() - exact).abs() <= unit * exact.abs() + 1e-6 * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "few"), [(0, 4), (1, 1), (70, 16), (130, 96)])
@pytest.mark.parametrize("width", [NARROW, NARROW + 72])
def test_a_sum_in_place(rows: int, width: int, few: int, turned: bool, dtype: torch.dtype) -> None:
    base, left, right = draw(rows, width, dtype=dtype), draw(rows, few + 9, dtype=dtype), draw(few, width, dtype=dtype)
    left = left[:, 5 : 5 + few]
    before = base.clone()
    found = add_low_rank(base, left, right.T.contiguous() if turned else right, -1.5, turned=turned)
    assert found is base
    check(found, before, left, right, -1.5)
    base, left = before.clone(), left.T.contiguous().T
    found = add_low_rank(base, left, right.T if turned else right.T.contiguous().T, -1.5, turned=turned)
    check(found, before, left, right, -1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize(
    ("widths", "fews"),
    [((40,), (3,)), ((128, 72), (16, 16)), ((200, 8, 136), (1, 70, 16)), ((8, 8, 8, 8), (2, 2, 2, 2))],
    ids=str,
)
def test_sums_of_parts(widths: tuple[int, ...], fews: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    base, left = draw(rows, sum(widths), dtype=dtype), draw(rows, sum(fews), dtype=dtype)
    before = base.clone()
    # One after the other: contiguous, transposed, contiguous ...
    each = enumerate(zip(widths, fews, strict=True))
    rights = [
        draw(few, width, dtype=dtype, seed=n).T if n % 2 else draw(width, few, dtype=dtype, seed=n)
        for n, (width, few) in each
    ]
    found = low_rank_sums(base, left, rights, 0.25)
    assert torch.equal(base, before)
    parts = zip(found, base.split(widths, dim=1), left.split(fews, dim=1), rights, strict=True)
    for each, part, few, right in parts:
        assert each.is_contiguous()
        assert each._base is None
        check(each, part, few, right.T, 0.25)


def test_where_there_is_triton_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(low_rank_sum, "launch", lambda kernel, *_, **__: launched.append(kernel))
    base, left, right = (draw(*shape, dtype=torch.float32) for shape in ((4, NARROW + 8), (4, 2), (2, NARROW + 8)))
    add_low_rank(base, left, right, turned=False)
    low_rank_sums(base, left.repeat(1, 2), [right.T[:8].contiguous(), right.T[8:].contiguous()], 1.0)
    assert launched == ([low_rank_sum._add] * 2 if by_triton(base) else [])
