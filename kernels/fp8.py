"""Products with frozen weights in FP8, forward and backward, from one copy of the weight's codes.

A weight W [out, in] is stored as e4m3 codes with one scale per output channel, W = diag(s) C. The product x·Wᵀ takes x
as codes too, with one scale per token. So does g·W = (g·diag(s))·C: the gradient is multiplied by the weight's scales
before it is cast, so that no scale varies along the dimension that the product sums over. Tensor cores require that
dimension to be contiguous in both operands; for g·W the codes are therefore transposed into temporary memory, unless a
transposed copy is given.

On devices without FP8 tensor cores, weights are dequantised before each product, and x and g are not cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_pipelite.kernels.device import runs_triton
from lightning_pipelite.kernels.fp8_rows import cast_rows, dequantise_rows
from lightning_pipelite.kernels.launch import launch

MULTIPLE = 16  # tensor cores require the sides of a weight to be multiples of this
OLDEST = (8, 9)  # compute capability of the first GPUs with FP8 tensor cores

ROWS, COLUMNS = 32, 32  # of a block to be transposed, in words of four codes


def has_fp8(device: torch.device) -> bool:
    """Tell whether ``device`` has products in FP8; meta stands for the local GPU or, without one, for one that does."""
    if device.type == "meta":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= OLDEST
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= OLDEST


def transposed(codes: Tensor) -> Tensor:
    """Return a transposed copy of contiguous codes [rows, columns], both sides multiples of four."""
    if codes.is_meta or not runs_triton(codes):
        return codes.T.contiguous()
    rows, columns = (size // 4 for size in codes.shape)
    out = codes.new_empty(codes.shape[1], codes.shape[0])
    grid = (triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS), 1)
    of_four = codes.view(torch.int32), out.view(torch.int32)
    launch(_transpose, grid, *of_four, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return out


def product(
    rows: Sequence[Tensor], weight: Sequence[Tensor], dtype: torch.dtype, bias: Tensor | None = None, *, back: bool
) -> Tensor:
    """Return x·Wᵀ + bias, or g·W.

    Args:
        rows: The input x [tokens, in], or the gradient g [tokens, out], of ``dtype``; or codes and scales of x, or of
            g·diag(s), as :func:`~lightning_pipelite.kernels.fp8_rows.cast_rows` gives them.
        weight: Codes C [out, in] and scales s [out]; and optionally Cᵀ [in, out], which may be columns of a larger one.
        dtype: The result's dtype.
        bias: [out].
        back: Whether to compute g·W.
    """
    codes, scales, *cached = weight
    if len(rows) == 1:
        whole = dequantise_rows(codes, scales, dtype)
        return rows[0] @ whole if back else torch.nn.functional.linear(rows[0], whole, bias)
    left, of_left = rows
    if not left.numel():
        return left.new_zeros(left.shape[0], codes.shape[1 if back else 0], dtype=dtype)
    right, of_right = codes, scales
    if back:
        right, of_right = cached[0] if cached else transposed(codes), _ones(codes.shape[1], codes.device)
    if left.device.type == "cpu":  # a reference to compare with
        result = (left.float() @ right.float().T) * of_right * of_left.unsqueeze(1)
        return (result if bias is None else result + bias).to(dtype)
    # Its documented counterpart is torch.nn.functional.scaled_mm: switch to that when this one is removed.
    return torch._scaled_mm(
        left, right.T, of_left.unsqueeze(1), of_right.unsqueeze(0), bias=bias, out_dtype=dtype, use_fast_accum=True
    )


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    """Return scales of one for columns that need none; cached, so as not to be made in every product."""
    return torch.ones(count, device=device)


def fp8_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, *, in_fp8: bool) -> Tensor:
    """Return x·Wᵀ + bias; only the weight is saved for the backward pass.

    Args:
        x: [..., in].
        weight: Codes [out, in], scales [out] and optionally the transposed codes [in, out], frozen.
        bias: [out], frozen.
        in_fp8: Whether the products are computed in FP8.
    """
    result: Tensor = _Linear.apply(x, *weight, *[None] * (3 - len(weight)), bias, in_fp8)
    return result


def fp8_linear_reference(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Compute the same in plain torch, in the precision of x, which is not cast."""
    return torch.nn.functional.linear(x, weight[0].to(x.dtype) * weight[1].to(x.dtype).unsqueeze(1), bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, cached: Tensor | None, bias: Tensor | None, in_fp8: bool
    ) -> Tensor:
        weight = [codes, scales] if cached is None else [codes, scales, cached]
        ctx.save_for_backward(*weight)
        ctx.in_fp8 = in_fp8
        rows = cast_rows(x) if in_fp8 else [x]
        return torch.ops.pipelite.fp8_product(rows, weight, bias, False, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight = ctx.saved_tensors
        rows = cast_rows(gradient, weight[1]) if ctx.in_fp8 else [gradient]
        of_x = torch.ops.pipelite.fp8_product(rows, [*weight], None, True, gradient.dtype)
        return of_x, None, None, None, None, None


# A custom operation: if the compiler saw weights being dequantised or transposed, it would save the results for the
# backward pass.
_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define("fp8_product(Tensor[] rows, Tensor[] weight, Tensor? bias, bool back, ScalarType dtype) -> Tensor")


@torch.library.impl(_LIBRARY, "fp8_product", "CompositeExplicitAutograd")
def product_operation(
    rows: list[Tensor], weight: list[Tensor], bias: Tensor | None, back: bool, dtype: torch.dtype
) -> Tensor:
    """Compute :func:`product` for x [..., in] or g [..., out], as one operation that is opaque to torch.compile."""
    shape = rows[0].shape[:-1]
    flat = [rows[0].reshape(-1, rows[0].shape[-1]), *rows[1:]]
    return product(flat, weight, dtype, bias, back=back).view(*shape, -1)


@torch.library.register_fake("pipelite::fp8_product", lib=_LIBRARY)
def _(rows: list[Tensor], weight: list[Tensor], bias: Tensor | None, back: bool, dtype: torch.dtype) -> Tensor:
    return rows[0].new_empty(*rows[0].shape[:-1], weight[0].shape[1 if back else 0], dtype=dtype)


@triton.jit
def _transpose(source, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Turn four rows of words into four words of each column at a time: codes are never read or written singly."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = source + (4 * row.to(tl.int64))[:, None] * columns + column[None, :]
    first = tl.load(at, mask=inside, other=0)
    second = tl.load(at + columns, mask=inside, other=0)
    third = tl.load(at + 2 * columns, mask=inside, other=0)
    fourth = tl.load(at + 3 * columns, mask=inside, other=0)
    to = out + (4 * column.to(tl.int64))[None, :] * rows + row[:, None]
    for number in tl.static_range(4):
        by = 8 * number
        word = ((first >> by) & 255) | (((second >> by) & 255) << 8)
        word |= (((third >> by) & 255) << 16) | (((fourth >> by) & 255) << 24)
        tl.store(to + number * rows, word, mask=inside)
