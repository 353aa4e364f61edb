"""Experts of a mixture, frozen, with low-rank adapters: grouped products, and no matrix but the weights themselves.

A layer of experts is :func:`experts_in` (each token's copies, sorted by expert, through the first matrices), an
activation, and :func:`experts_out` (through the second ones, weighted by the router's scores and added up). Nothing is
kept for the backward pass but what goes into them and the adapters' x·Aᵀ [rows, rank]: the gradient of the scores is
taken from the input of the second product, so that its output is neither kept nor computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_pipelite.kernels.grouped import Groups, grouped_outer, grouped_product, sum_copies, weigh
from lightning_pipelite.kernels.lora import WHOLE, dequantise


class Matrices(NamedTuple):
    """The experts' frozen weights.

    Attributes:
        parts: [experts, out, in] as one tensor of the computation's dtype, or its parts in nf4 (see
            :data:`~lightning_pipelite.kernels.lora.FOUR_BIT`).
        shape: Experts, out, in; or experts, in, out where they lie the other way.
        transposed: Whether they do.
        bias: [experts, out].
    """

    parts: Sequence[Tensor]
    shape: tuple[int, int, int]
    transposed: bool = False
    bias: Tensor | None = None


class Factors(NamedTuple):
    """The experts' adapters, s·B·A for each.

    Attributes:
        a: [experts, rank, in], of any floating dtype, with any strides.
        b: [experts, out, rank].
        scale: S.
    """

    a: Tensor
    b: Tensor
    scale: float


def experts_in(x: Tensor, groups: Groups, matrices: Matrices, factors: Factors | None = None) -> Tensor:
    """Return ``x Wₑᵀ + biasₑ + s (x Aₑᵀ) Bₑᵀ`` for each copy of each token, sorted by expert: [rows, out].

    Args:
        x: [tokens, in].
        groups: Which experts each token goes to.
        matrices: W and bias.
        factors: A, B and s.
    """
    a, b, *rounded = _given(x, groups, factors, gather=True)
    return _In.apply(x, a, b, *rounded, *_flat(matrices, x), 1.0 if factors is None else factors.scale, groups)


def experts_out(
    x: Tensor, scores: Tensor, chosen: Tensor, groups: Groups, matrices: Matrices, factors: Factors | None = None
) -> Tensor:
    """Return, for each token, the sum over its experts e of ``score · (x Wₑᵀ + biasₑ + s (x Aₑᵀ) Bₑᵀ)``: [tokens, out].

    Args:
        x: [rows, in], sorted by expert.
        scores: [tokens, copies], of any floating dtype.
        chosen: Int [tokens, copies], the experts.
        groups: What they come to.
        matrices: W and bias.
        factors: A, B and s.
    """
    a, b, *rounded = _given(x, groups, factors, gather=False)
    scale = 1.0 if factors is None else factors.scale
    return _Out.apply(x, scores.contiguous(), chosen, a, b, *rounded, *_flat(matrices, x), scale, groups)


def experts_reference(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    first: Matrices,
    second: Matrices,
    activation: Any,
    first_factors: Factors | None = None,
    second_factors: Factors | None = None,
) -> Tensor:
    """Return the whole in plain torch, in the precision of its arguments.

    Every expert by its own matrices, formed in full.
    """
    total = torch.zeros_like(x)
    for expert in range(first.shape[0]):
        tokens, copies = torch.where(chosen == expert)
        values = x[tokens]
        for matrices, factors in ((first, first_factors), (second, second_factors)):
            weight = matrices.parts[0][expert].T if matrices.transposed else matrices.parts[0][expert]
            if factors is not None:
                weight = weight + factors.scale * factors.b[expert] @ factors.a[expert]
            values = values @ weight.T if matrices.bias is None else values @ weight.T + matrices.bias[expert]
            values = activation(values) if matrices is first else values
        total = total.index_add(0, tokens, values * scores[tokens, copies, None])
    return total


def _given(x: Tensor, groups: Groups, factors: Factors | None, *, gather: bool) -> tuple[Tensor | None, ...]:
    """Return what an operation is given of the adapters: themselves, for their gradients, and what it computes with."""
    if factors is None:
        return None, None, None, None, None
    a, b, scale = factors
    down = (scale * a.detach()).to(x.dtype).contiguous()
    up = b.detach().to(x.dtype).contiguous()
    # Apart from the rest, so that a recomputation need not run all of it for this.
    return a, b, grouped_product(x.detach(), down, groups, gather=gather), down, up


def _flat(matrices: Matrices, x: Tensor) -> tuple[Any, ...]:
    bias = None if matrices.bias is None else matrices.bias.detach().to(x.dtype)
    return tuple(part.detach() for part in matrices.parts), matrices.shape, matrices.transposed, bias


class _In(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        along: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        parts: tuple[Tensor, ...],
        shape: tuple[int, int, int],
        transposed: bool,
        bias: Tensor | None,
        scale: float,
        groups: Groups,
    ) -> Tensor:
        ctx.shape, ctx.transposed, ctx.scale = shape, transposed, scale
        ctx.adapted, ctx.dtypes = a is not None, (None if a is None else a.dtype, None if b is None else b.dtype)
        rounded = () if along is None else (along, down, up)
        ctx.save_for_backward(x, *groups, *rounded, *parts)
        return _times(x, parts, shape, transposed, groups, True, along, up, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        groups, rounded, parts = _unpacked(saved, ctx.adapted)
        gradient = gradient.contiguous()
        of_x = of_a = of_b = left = right = None
        if ctx.adapted:
            along, down, up = rounded
            left, right = grouped_product(gradient, up.mT, groups), down.mT
            of_a = grouped_outer(left, x, groups, gather=True, scale=ctx.scale).mT.to(ctx.dtypes[0])
            of_b = grouped_outer(along, gradient, groups).to(ctx.dtypes[1])
        if ctx.needs_input_grad[0]:
            rows = _times(gradient, parts, ctx.shape, not ctx.transposed, groups, False, left, right, None)
            of_x = sum_copies(rows, groups)
        return of_x, of_a, of_b, None, None, None, None, None, None, None, None, None


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scores: Tensor,
        chosen: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        along: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        parts: tuple[Tensor, ...],
        shape: tuple[int, int, int],
        transposed: bool,
        bias: Tensor | None,
        scale: float,
        groups: Groups,
    ) -> Tensor:
        ctx.shape, ctx.transposed, ctx.scale = shape, transposed, scale
        ctx.adapted, ctx.dtypes = a is not None, (None if a is None else a.dtype, None if b is None else b.dtype)
        ctx.biased = bias is not None
        rounded = () if along is None else (along, down, up)
        biases = () if bias is None else (bias,)
        ctx.save_for_backward(x, scores, chosen, *biases, *groups, *rounded, *parts)
        rows = _times(x, parts, shape, transposed, groups, False, along, up, bias)
        return sum_copies(rows, groups, scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Compute the gradients.

        With g the token's gradient, and c the copy's score, that of x is c g (W + s B A), and that of c is the same
        without c, times x.
        """
        x, scores, chosen, *saved = ctx.saved_tensors
        bias = saved[0] if ctx.biased else None
        groups, rounded, parts = _unpacked(saved[1:] if ctx.biased else saved, ctx.adapted)
        gradient = gradient.contiguous()
        of_x = of_scores = of_a = of_b = left = right = None
        if ctx.adapted:
            along, down, up = rounded
            left, right = grouped_product(gradient, up.mT, groups, gather=True), down.mT
            of_a = grouped_outer(left, x, groups, scores=scores, scale=ctx.scale).mT.to(ctx.dtypes[0])
            of_b = grouped_outer(along, gradient, groups, gather=True, scores=scores).to(ctx.dtypes[1])
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            rows = _times(gradient, parts, ctx.shape, not ctx.transposed, groups, True, left, right, None)
            of_x, of_scores = weigh(rows, x, groups, scores)
            if bias is not None:
                of_scores = of_scores + (gradient @ bias.T).gather(1, chosen.to(torch.int64)).to(of_scores.dtype)
            of_scores = of_scores.to(scores.dtype)
        return of_x, of_scores, None, of_a, of_b, None, None, None, None, None, None, None, None, None


def _unpacked(saved: Sequence[Tensor], adapted: bool) -> tuple[Groups, Sequence[Tensor], tuple[Tensor, ...]]:
    end = 7 if adapted else 4
    return Groups(*saved[:4]), saved[4:end], tuple(saved[end:])


def _times(
    x: Tensor,
    parts: tuple[Tensor, ...],
    shape: tuple[int, int, int],
    flipped: bool,
    groups: Groups,
    gather: bool,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return the grouped product with weights [groups, out, in], or, ``flipped``, with [groups, in, out]."""
    if len(parts) == WHOLE:
        weight = parts[0].mT if flipped else parts[0]
        return grouped_product(x, weight, groups, gather=gather, left=left, right=right, bias=bias)
    return torch.ops.pipelite.grouped_product_4bit(
        x, list(parts), list(shape), flipped, list(groups), gather, left, right, bias
    )


# An operation, as the compiler would keep weights that it sees made for the backward pass.
_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define(
    "grouped_product_4bit(Tensor x, Tensor[] parts, int[] shape, bool flipped, Tensor[] groups, bool gather, "
    "Tensor? left, Tensor? right, Tensor? bias) -> Tensor"
)


@torch.library.impl(_LIBRARY, "grouped_product_4bit", "CompositeExplicitAutograd")
def product_4bit_operation(
    x: Tensor,
    parts: list[Tensor],
    shape: list[int],
    flipped: bool,
    groups: list[Tensor],
    gather: bool,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return the weights of one layer become whole at a time, in memory that is free again after the product."""
    whole = dequantise(parts, shape, x.dtype)
    weight = whole.mT if flipped else whole
    return grouped_product(x, weight, Groups(*groups), gather=gather, left=left, right=right, bias=bias)


@torch.library.register_fake("pipelite::grouped_product_4bit", lib=_LIBRARY)
def _(
    x: Tensor,
    parts: list[Tensor],
    shape: list[int],
    flipped: bool,
    groups: list[Tensor],
    gather: bool,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(groups[0].shape[0], shape[2 if flipped else 1])
