"""Linear layers with low-rank adapters: what they compute together, without float32 copies of activations.

The products go through torch's matrix multiplication, which no Triton kernel of so few columns beats; what is gained is
in how they are put together. Projections that share their input (query, key and value) are computed by one operation:
the input meets all their A at once, each frozen weight's product is added in place to what B made, and the backward
pass adds up one gradient of the input in place. Nothing is kept but the input and x·Aᵀ [tokens, rank].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WHOLE, FOUR_BIT, DOUBLE = 1, 2, 5
"""Of how many tensors a frozen weight is made: itself; nf4 codes and their scales; or scales that are
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
    down, ups = _rounded([] if projected is not None else a, b, x.dtype)
    # Apart from the rest, so that a recomputation need not run all of it for this.
    along = x.new_empty(0) if projected is not None else x.detach().flatten(0, -2) @ down.T
    return torch.ops.pipelite.lora_linear(
        x,
        [tensor for weight in weights for tensor in weight],
        [len(weight) for weight in weights],
        [] if projected is not None else list(a),
        list(b),
        along,
        down,
        ups,
        list(projected or []),
        [x.new_empty(0) if bias is None else bias for bias in biases],
        list(scales),
    )


def _rounded(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A on end [ranks, in], and each B, in another dtype: copied together, as each is small."""
    tensors = [tensor.detach() for tensor in (*a, *b)]
    if any(tensor.dtype != dtype for tensor in tensors):
        flat = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
        parts = flat.split([tensor.numel() for tensor in tensors])
        tensors = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        down = flat[: sum(tensor.numel() for tensor in a)]
        down = down.view(-1, a[0].shape[1]) if a else down
    else:
        down = torch.cat(tensors[: len(a)]) if a else tensors[0].new_empty(0)
    return down, tensors[len(a) :]


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


# Not torch.library.custom_op, whose checks of each call take the host longer than the products take a GPU.
_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor[] weights, int[] parts, Tensor[] a, Tensor[] b, Tensor along, Tensor down, "
    "Tensor[] ups, Tensor[] projected, Tensor[] biases, float[] scales) -> Tensor[]"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor[] gradients, Tensor x, Tensor along, Tensor[] weights, int[] parts, Tensor down, "
    "Tensor[] ups, Tensor[] projected, float[] scales, bool to_x) -> Tensor[]"
)


@torch.library.impl(_LIBRARY, "lora_linear", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    weights: list[Tensor],
    parts: list[int],
    a: list[Tensor],
    b: list[Tensor],
    along: Tensor,
    down: Tensor,
    ups: list[Tensor],
    projected: list[Tensor],
    biases: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    """Return the outputs.

    Args:
        a: there for its gradient, as is ``b``; what is computed with is ``down`` and ``ups``.
        along: x·Aᵀ [tokens, all ranks], nothing where it was given.
    """
    rows = x.reshape(-1, x.shape[-1])
    alongs = _alongs(along, ups, projected)
    outputs = []
    for weight, part, up, bias, scale in zip(_lists(weights, parts), alongs, ups, biases, scales, strict=True):
        width = up.shape[0]
        # The adapter's product first: the large one, bound by arithmetic, reads in passing what it adds to. On an H100,
        # 4096 tokens from 4096 to 14336: 0.76 ms, 0.83 the other way round, 0.71 for the large product alone.
        if bias.numel():
            output = torch.addmm(bias, part, up.T, alpha=scale)
        else:
            output = x.new_empty(rows.shape[0], width).addmm_(part, up.T, beta=0, alpha=scale)
        output.addmm_(rows, _whole(weight, width, x).T)
        outputs.append(output.view(*x.shape[:-1], width))
    return outputs


@torch.library.register_fake("pipelite::lora_linear", lib=_LIBRARY)
def _(
    x: Tensor,
    weights: list[Tensor],
    parts: list[int],
    a: list[Tensor],
    b: list[Tensor],
    along: Tensor,
    down: Tensor,
    ups: list[Tensor],
    projected: list[Tensor],
    biases: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], up.shape[0]) for up in ups]


@torch.library.impl(_LIBRARY, "lora_linear_backward", "CompositeExplicitAutograd")
def _backward(
    gradients: list[Tensor],
    x: Tensor,
    along: Tensor,
    weights: list[Tensor],
    parts: list[int],
    down: Tensor,
    ups: list[Tensor],
    projected: list[Tensor],
    scales: list[float],
    to_x: bool,
) -> list[Tensor]:
    """Return the gradients of x (nothing if it needs none), of all A on end or of the given projections, and of each B.

    Those of A and B are in float32. A gradient that is empty is that of an output which nobody used.
    """
    rows = x.reshape(-1, x.shape[-1])
    ranks = [up.shape[1] for up in ups]
    alongs = _alongs(along, ups, projected)
    back = x.new_empty(rows.shape[0], sum(ranks))
    backs = back.split(ranks, dim=1)
    given = [g.reshape(rows.shape[0], -1) if g.numel() else None for g in gradients]
    of_b = []
    for g, part, of_part, up, scale in zip(given, alongs, backs, ups, scales, strict=True):
        if g is None:
            of_part.zero_()
            of_b.append(torch.zeros_like(up, dtype=torch.float32))
            continue
        torch.mm(g, up, out=of_part)
        of_up = _precise_product(g.T, part)
        if scale != 1:
            of_part.mul_(scale)
            of_up.mul_(scale)
        of_b.append(of_up)
    if projected:
        of_a = [part.reshape(each.shape).clone() for part, each in zip(backs, projected, strict=True)]
    else:
        of_a = [_precise_product(back.T, rows)]
    if not to_x:
        return [x.new_empty(0), *of_a, *of_b]
    of_x = x.new_zeros(rows.shape) if projected else back @ down  # the small product first, as forward
    for g, weight, up in zip(given, _lists(weights, parts), ups, strict=True):
        if g is not None:
            of_x.addmm_(g, _whole(weight, up.shape[0], x))
    return [of_x.view(x.shape), *of_a, *of_b]


@torch.library.register_fake("pipelite::lora_linear_backward", lib=_LIBRARY)
def _(
    gradients: list[Tensor],
    x: Tensor,
    along: Tensor,
    weights: list[Tensor],
    parts: list[int],
    down: Tensor,
    ups: list[Tensor],
    projected: list[Tensor],
    scales: list[float],
    to_x: bool,
) -> list[Tensor]:
    of_a = [torch.empty_like(each) for each in projected] or [torch.empty_like(down, dtype=torch.float32)]
    return [x.new_empty(x.shape if to_x else 0), *of_a, *(torch.empty_like(up, dtype=torch.float32) for up in ups)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, parts, a, b, along, down, ups, projected, _, scales = inputs
    ctx.parts, ctx.scales, ctx.dtypes = parts, scales, [tensor.dtype for tensor in (*a, *b)]
    ctx.a_ranks = [each.shape[0] for each in a]
    ctx.counts = [len(weights), len(ups), len(projected)]
    ctx.save_for_backward(x, along, down, *weights, *ups, *projected)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    x, along, down, *saved = ctx.saved_tensors
    weights, ups, projected = _lists(saved, ctx.counts)
    given = [x.new_empty(0) if gradient is None else gradient for gradient in gradients]
    to_x = bool(ctx.needs_input_grad[0])
    of_x, *rest = torch.ops.pipelite.lora_linear_backward(
        given, x, along, weights, ctx.parts, down, ups, projected, ctx.scales, to_x
    )
    count = len(ups)
    of_ab = [*(rest[0].split(ctx.a_ranks) if ctx.a_ranks else []), *rest[-count:]]
    of_ab = [gradient.to(dtype) for gradient, dtype in zip(of_ab, ctx.dtypes, strict=True)]
    return (
        of_x if to_x else None,
        [None] * len(weights),
        None,
        of_ab[: len(ctx.a_ranks)],
        of_ab[len(ctx.a_ranks) :],
        None,
        None,
        [None] * count,
        rest[:count] if projected else [],
        [None] * count,
        None,
    )


torch.library.register_autograd("pipelite::lora_linear", _differentiate, setup_context=_keep, lib=_LIBRARY)


def _alongs(along: Tensor, ups: list[Tensor], projected: list[Tensor]) -> list[Tensor]:
    if projected:
        return [each.reshape(-1, each.shape[-1]) for each in projected]
    return list(along.split([up.shape[1] for up in ups], dim=1))


def _lists(flat: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    lists, start = [], 0
    for count in counts:
        lists.append(list(flat[start : start + count]))
        start += count
    return lists


def _whole(weight: list[Tensor], rows: int, x: Tensor) -> Tensor:
    """The weight [rows, in] in x's dtype."""
    return weight[0] if len(weight) == WHOLE else dequantise(weight, (rows, x.shape[-1]), x.dtype)


def dequantise(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a weight in ``dtype`` from its parts in nf4, see :data:`FOUR_BIT`."""
    import bitsandbytes  # noqa: F401 (for its operations, as its functions take the host several times as long)

    codes, scales = parts[:FOUR_BIT]
    if len(parts) == DOUBLE:
        outer, outer_values, offset = parts[FOUR_BIT:]
        scales = torch.ops.bitsandbytes.dequantize_blockwise(scales, outer, outer_values, SCALES_BLOCK, torch.float32)
        scales += offset
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)


def _precise_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, a sum over many tokens, in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda or left.is_meta:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
