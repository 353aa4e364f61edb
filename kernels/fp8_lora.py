"""What is particular to FP8 in linear layers with low-rank adapters (:mod:`~lightning_pipelite.kernels.lora`).

torch has no FP8 product that adds to a given matrix, so the adapter's product is added afterwards, to wide outputs by a
kernel that does nothing else, at the speed of memory. Where a weight holds those of several wide projections, it is
multiplied once, forward and backward, but each output and each gradient is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_pipelite.kernels import fp8
from lightning_pipelite.kernels.fp8_rows import WIDEST, cast_now, cast_rows
from lightning_pipelite.kernels.lora_operands import Operands
from lightning_pipelite.kernels.low_rank_sum import add_low_rank, low_rank_sums


def outputs_in_fp8(codes: list[Tensor], it: Operands, dtype: torch.dtype) -> list[Tensor]:
    """Return the output of each projection [tokens, out], for x's codes."""
    given = zip(it.weights, it.biases, strict=True)
    wholes = [fp8.product([*codes, *it.row_scales], w, dtype, *bias, back=False) for w, bias in given]
    if it.joined:
        along = torch.cat(it.along, dim=1) if len(it.along) > 1 else it.along[0]
        return low_rank_sums(wholes[0], along, it.ups, it.scales[0])
    each = zip(wholes, it.alongs, it.ups, it.scales, strict=True)
    return [add_low_rank(whole, along, up, scale, turned=True) for whole, along, up, scale in each]


def casts_are_fused(it: Operands) -> bool:
    """Tell whether the compiler can cast the gradients in what computes them: if they are narrow, and not joined."""
    return not it.joined and max(up.shape[0] for up in it.ups) <= WIDEST


def cast_gradients(gradients: Sequence[Tensor | None], it: Operands, *, now: bool) -> list[Tensor]:
    """Return codes and scales of each projection's gradient [tokens, out], or of all, joined, if their weight is.

    Of an output that was not used, they are empty, or zeros among the others.

    Args:
        gradients: The gradient of each output, if it was used.
        it: The operands.
        now: Whether this is inside of an operation, where no compiler fuses the cast; only there they may be joined.
    """
    along = it.alongs[0]
    if it.joined:
        each = zip(gradients, it.ups, strict=True)
        parts = [along.new_zeros(along.shape[0], up.shape[0]) if g is None else g for g, up in each]
        return cast_now(parts, it.weights[0][1])
    codes = []
    for g, weight in zip(gradients, it.weights, strict=True):
        if g is None:
            codes += [along.new_empty(0)] * 2
        else:
            codes += cast_now([g], weight[1]) if now else cast_rows(g, weight[1])
    return codes


def gradient_of_x(gradients: Sequence[Tensor | None], codes: list[Tensor], back: Tensor, it: Operands) -> Tensor:
    """Return the gradient of x [tokens, in].

    Args:
        gradients: The gradient of each output [tokens, out], if it was used.
        codes: What :func:`cast_gradients` returned; or nothing, and they are cast here.
        back: The gradient of x·Aᵀ [tokens, ranks].
        it: The operands.
    """
    codes = codes or cast_gradients(gradients, it, now=True)
    of_x: Tensor | None = None
    for number, weight in enumerate(it.weights):
        rows = codes[2 * number : 2 * number + 2]
        if rows[0].numel():
            of_one = fp8.product(rows, weight, back.dtype, back=True)
            of_x = of_one if of_x is None else of_x.add_(of_one)
    if of_x is None:
        of_x = back.new_zeros(back.shape[0], it.weights[0][0].shape[1])
    return add_low_rank(of_x, back, it.down[0], turned=False) if it.down else of_x
