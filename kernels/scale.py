"""Scales a gradient by a scalar that is known only to the GPU, and is mostly one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import runs_triton

BLOCK = 4096


@triton.jit
def _kernel(values, factor, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:  # also true of NaN
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < number
        x = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + places, x * by, mask=inside)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``values`` in place, computing in float32; if the factor is one, they are not even read.

    Args:
        values: Float32, bfloat16 or float16, contiguous.
        factor: A scalar on the same device.

    Returns:
        ``values``.
    """
    if runs_triton(values) and values.numel():
        _kernel[(triton.cdiv(values.numel(), BLOCK),)](values, factor, values.numel(), BLOCK=BLOCK)
        return values
    return values.mul_(factor)
