"""Linear layers with low-rank adapters: what they compute together, without float32 copies of activations.

The products go through torch's matrix multiplication, which no Triton kernel of so few columns beats; what is gained is
in how they are put together. Projections that share their input (query, key and value) are computed by one operation:
the input meets all their A at once, each B is added in place to what the frozen weight made, and the backward pass adds
up one gradient of the input in place. Nothing is kept but the input and x·Aᵀ [tokens, rank].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WHOLE, FOUR_BIT, DOUBLE = 1, 3, 6
"""Of how many tensors a frozen weight is made: itself; nf4 codes, their scales and the 16 values; or scales that are
quantised themselves, which takes their own scales, values and offset as well."""

BLOCK, SCALES_BLOCK = 64, 256  # of bitsandbytes: how many weights have one scale, and how many scales have one


def lora_linear(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
    projected: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return ``x Wᵢᵀ + biasᵢ + sᵢ (x Aᵢᵀ) Bᵢᵀ`` for every i, from one reading of x.

    Products are summed in float32 and their results rounded to x's dtype; A and B are rounded to it where they are
    used, and their gradients, which sum over all tokens, are not.

    Args:
        x: [..., in], the computation's dtype.
        weights: frozen Wᵢ [out, in] of x's dtype, as one tensor; or its parts in nf4, see :data:`FOUR_BIT`.
        a: Aᵢ [rank, in], of any floating dtype.
        b: Bᵢ [out, rank].
        biases: [out], or None.
        scales: sᵢ.
        projected: x Aᵢᵀ [..., rank] where something lies between, such as dropout; then ``a`` is not used.

    Returns:
        [..., out] each, in x's dtype.
    """
    parts = [len(weight) for weight in weights]
    flat = [tensor for weight in weights for tensor in weight]
    absent = x.new_empty(0)
    outputs = _forward(
        x,
        flat,
        parts,
        [] if projected is not None else list(a),
        list(projected or []),
        list(b),
        [absent if bias is None else bias for bias in biases],
        list(scales),
    )
    return outputs[1:]


def lora_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
) -> list[Tensor]:
    """The same in plain torch, in the precision of its arguments."""
    return [
        torch.nn.functional.linear(x, w, bias) + scale * (x @ down.T @ up.T)
        for w, down, up, bias, scale in zip(weights, a, b, biases, scales, strict=True)
    ]


@torch.library.custom_op("pipelite::lora_linear", mutates_args=())
def _forward(
    x: Tensor,
    weights: list[Tensor],
    parts: list[int],
    a: list[Tensor],
    projected: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    """Return x·Aᵀ [tokens, all ranks] (nothing where it was given), and the outputs."""
    rows = x.reshape(-1, x.shape[-1])
    alongs: Sequence[Tensor]
    if a:
        along = rows @ torch.cat(a).to(x.dtype).T
        alongs = along.split([each.shape[0] for each in a], dim=1)
    else:
        along = x.new_empty(0)
        alongs = [each.reshape(-1, each.shape[-1]) for each in projected]
    outputs = []
    for weight, part, up, bias, scale in zip(_lists(weights, parts), alongs, b, biases, scales, strict=True):
        whole = _whole(weight, up.shape[0], x)
        output = torch.addmm(bias, rows, whole.T) if bias.numel() else rows @ whole.T
        output.addmm_(part, up.to(x.dtype).T, alpha=scale)
        outputs.append(output.view(*x.shape[:-1], -1))
    return [along, *outputs]


@_forward.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    parts: list[int],
    a: list[Tensor],
    projected: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    rows = x.numel() // x.shape[-1]
    along = x.new_empty(rows, sum(each.shape[0] for each in a)) if a else x.new_empty(0)
    return [along, *(x.new_empty(*x.shape[:-1], up.shape[0]) for up in b)]


@torch.library.custom_op("pipelite::lora_linear_backward", mutates_args=())
def _backward(
    gradients: list[Tensor],
    x: Tensor,
    along: Tensor,
    weights: list[Tensor],
    parts: list[int],
    a: list[Tensor],
    projected: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    to_x: bool,
) -> list[Tensor]:
    """Return the gradients of x (nothing if it needs none), of all A on end, of the given projections, and of each B.

    The last two kinds are in float32 and x's dtype in turn; a gradient of an output that nobody used is empty.
    """
    rows = x.reshape(-1, x.shape[-1])
    ranks = [up.shape[1] for up in b]
    alongs = along.split(ranks, dim=1) if a else [each.reshape(-1, each.shape[-1]) for each in projected]
    back = x.new_empty(rows.shape[0], sum(ranks))
    of_x: Tensor | None = None
    of_b = []
    for gradient, weight, part, of_part, up, scale in zip(
        gradients, _lists(weights, parts), alongs, back.split(ranks, dim=1), b, scales, strict=True
    ):
        if not gradient.numel():
            of_part.zero_()
            of_b.append(torch.zeros_like(up))
            continue
        g = gradient.reshape(rows.shape[0], -1)
        torch.mm(g, up.to(x.dtype), out=of_part)
        of_up = _precise_product(g.T, part)
        if scale != 1:
            of_part.mul_(scale)
            of_up.mul_(scale)
        of_b.append(of_up.to(up.dtype))
        if to_x:
            whole = _whole(weight, up.shape[0], x)
            of_x = g @ whole if of_x is None else of_x.addmm_(g, whole)
    if a:
        down = torch.cat(a)
        of_a = [_precise_product(back.T, rows).to(down.dtype)]
        if of_x is not None:
            of_x.addmm_(back, down.to(x.dtype))
    else:
        of_a = [part.reshape(each.shape).clone() for part, each in zip(back.split(ranks, 1), projected, strict=True)]
    if to_x and of_x is None:
        of_x = torch.zeros_like(rows)
    return [x.new_empty(0) if of_x is None else of_x.view(x.shape), *of_a, *of_b]


@_backward.register_fake
def _(
    gradients: list[Tensor],
    x: Tensor,
    along: Tensor,
    weights: list[Tensor],
    parts: list[int],
    a: list[Tensor],
    projected: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    to_x: bool,
) -> list[Tensor]:
    of_a = [a[0].new_empty(along.shape[1], x.shape[-1])] if a else [torch.empty_like(each) for each in projected]
    return [x.new_empty(x.shape if to_x else 0), *of_a, *(up.new_empty(up.shape) for up in b)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, parts, a, projected, b, _, scales = inputs
    ctx.parts, ctx.scales = parts, scales
    ctx.counts = [len(weights), len(a), len(projected), len(b)]
    ctx.save_for_backward(x, output[0], *weights, *a, *projected, *b)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    x, along, *saved = ctx.saved_tensors
    weights, a, projected, b = _lists(saved, ctx.counts)
    given = [x.new_empty(0) if gradient is None else gradient for gradient in gradients[1:]]
    to_x = bool(ctx.needs_input_grad[0])
    of_x, *rest = _backward(given, x, along, weights, ctx.parts, a, projected, b, ctx.scales, to_x)
    of_a: list[Tensor] | None = None
    of_projected: list[Tensor] | None = None
    if a:
        of_a, of_b = list(rest[0].split([each.shape[0] for each in a])), rest[1:]
    else:
        of_projected, of_b = rest[: len(b)], rest[len(b) :]
    return (
        of_x if to_x else None,
        [None] * len(weights),
        None,
        of_a if a else [],
        of_projected if of_projected is not None else [],
        of_b,
        [None] * len(b),
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_keep)


def _lists(flat: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    lists, start = [], 0
    for count in counts:
        lists.append(list(flat[start : start + count]))
        start += count
    return lists


def _whole(weight: list[Tensor], rows: int, x: Tensor) -> Tensor:
    """The weight [rows, in] in x's dtype."""
    if len(weight) == WHOLE:
        return weight[0]
    from bitsandbytes.functional import QuantState, dequantize_4bit

    codes, scales, values = weight[:FOUR_BIT]
    nested: dict[str, Any] = {}
    if len(weight) == DOUBLE:
        outer, outer_values, offset = weight[FOUR_BIT:]
        state = QuantState(absmax=outer, code=outer_values, blocksize=SCALES_BLOCK, dtype=torch.float32)
        nested = {"offset": offset, "state2": state}
    state = QuantState(
        absmax=scales, shape=torch.Size((rows, x.shape[-1])), code=values, blocksize=BLOCK, quant_type="nf4",
        dtype=x.dtype, **nested,
    )  # fmt: skip
    return dequantize_4bit(codes, state)


def _precise_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, a sum over many tokens, in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
