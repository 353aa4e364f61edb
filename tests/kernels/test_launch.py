"""A direct launch takes the compiled kernel that fits its arguments, as a launch by Triton does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from lightning_pipelite.kernels.launch import _COMPILED, launch


@triton.jit
def _scaled(x, out, count, stride, by, TIMES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read every ``stride``-th number; wide loads are right only where addresses and strides allow them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(x + at * stride, mask=inside).to(tl.float32) * (by % 1024) * TIMES
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def launched(x: torch.Tensor, count: int, stride: int, by: int, **constants: int) -> torch.Tensor:
    out = torch.full((count,), float("nan"), device=x.device, dtype=x.dtype)
    launch(_scaled, (triton.cdiv(count, 128), 1, 1), x, out, count, stride, by, BLOCK=128, **constants)
    return out


@pytest.mark.gpu
def test_each_launch_takes_the_kernel_that_fits() -> None:
    """In two rounds over all cases: the first launches each through Triton, the second directly."""
    numbers = torch.arange(16384, device="cuda") % 97
    cases: list[tuple[torch.dtype, int, int, int, int, dict[str, Any]]] = [
        (dtype, first, count, stride, by, {"TIMES": times, **options})
        for dtype in (torch.float32, torch.bfloat16)
        for first in (0, 1, 16)
        for count, stride in ((1024, 1), (1000, 1), (1000, 3), (512, 16), (1, 1))
        for by in (1, 3, 16, 2**31 + 5)
        for times, options in ((1, {}), (2, {}), (2, {"num_warps": 8}))
    ]
    for _ in range(2):
        for dtype, first, count, stride, by, constants in cases:
            x = numbers.to(dtype)[first:]
            wanted = x[: count * stride : stride].float() * (by % 1024) * constants["TIMES"]
            assert torch.equal(launched(x, count, stride, by, **constants), wanted.to(dtype)), (dtype, first, count)
    assert len([key for key in _COMPILED if key[0] == id(_scaled)]) > 20
