"""Frozen experts of a MoE with low-rank adapters: grouped products that materialise no matrix but the weights.

A layer of experts is :func:`experts_in` (each token's copies, sorted by expert, through the first matrices), an
activation, and :func:`experts_out` (through the second ones, weighted by the router's scores and summed). Only their
inputs and the adapters' x·Aᵀ [rows, rank] are saved for the backward pass: the gradient of the scores is computed from
the input of the second product, so that its output is neither saved nor recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_pipelite.kernels.combine import sum_copies, weigh
from lightning_pipelite.kernels.frozen_weight import WHOLE
from lightning_pipelite.kernels.grouped_outer import grouped_outer
from lightning_pipelite.kernels.grouped_product import grouped_product, product_operation
from lightning_pipelite.kernels.groups import Groups
from lightning_pipelite.kernels.nf4 import dequantise


class Matrices(NamedTuple):
    """The experts' frozen weights.

    Attributes:
        parts: [experts, out, in] as one tensor of the computation's dtype, or its parts in nf4 (see
            :func:`~lightning_pipelite.kernels.nf4.dequantise`).
        shape: Experts, out, in; or experts, in, out if ``transposed``.
        transposed: Whether the weights are stored as [experts, in, out].
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
        scale: The scale s.
    """

    a: Tensor
    b: Tensor
    scale: float


def experts_in(x: Tensor, groups: Groups, matrices: Matrices, factors: Factors | None = None) -> Tensor:
    """Return ``x Wₑᵀ + biasₑ + s (x Aₑᵀ) Bₑᵀ`` for each copy of each token, sorted by expert: [rows, out].

    Args:
        x: [tokens, in].
        groups: The experts that each token is routed to.
        matrices: W and bias.
        factors: A, B and s.
    """
    return _apply(x, None, None, groups, matrices, factors)


def experts_out(
    x: Tensor, scores: Tensor, chosen: Tensor, groups: Groups, matrices: Matrices, factors: Factors | None = None
) -> Tensor:
    """Return, for each token, the sum over its experts e of ``score · (x Wₑᵀ + biasₑ + s (x Aₑᵀ) Bₑᵀ)``: [tokens, out].

    Args:
        x: [rows, in], sorted by expert.
        scores: [tokens, copies], of any floating dtype.
        chosen: Int [tokens, copies], the experts.
        groups: The same choices, sorted by expert.
        matrices: W and bias.
        factors: A, B and s.
    """
    return _apply(x, scores.contiguous(), chosen, groups, matrices, factors)


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
    """Compute the whole layer in plain torch, in the precision of its arguments.

    Each expert uses its own matrices, formed explicitly.
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


def _apply(
    x: Tensor,
    scores: Tensor | None,
    chosen: Tensor | None,
    groups: Groups,
    matrices: Matrices,
    factors: Factors | None,
) -> Tensor:
    """Pass the adapters twice: as they are, for their gradients, and rounded, for the computation."""
    given: tuple[Tensor | None, ...] = (None,) * 5
    if factors is not None:
        a, b, scale = factors
        down = (scale * a.detach()).to(x.dtype).contiguous()
        up = b.detach().to(x.dtype).contiguous()
        # Outside the function below, so that recomputing this product does not rerun the rest.
        given = a, b, grouped_product(x.detach(), down, groups, gather=scores is None), down, up
    parts = tuple(part.detach() for part in matrices.parts)
    bias = None if matrices.bias is None else matrices.bias.detach().to(x.dtype)
    frozen = parts, matrices.shape, matrices.transposed, bias
    return _Experts.apply(x, scores, chosen, *given, *frozen, 1.0 if factors is None else factors.scale, groups)


class _Experts(torch.autograd.Function):
    """A product with its backward pass: of each token's copies or, with ``scores``, of copies that are then summed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scores: Tensor | None,
        chosen: Tensor | None,
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
        ctx.dtypes = None if a is None or b is None else (a.dtype, b.dtype)
        rounded = () if along is None else (along, down, up)
        # The gradient of the scores needs the bias, and the experts that each score belongs to.
        combined = () if scores is None else (scores,) if bias is None else (scores, chosen, bias)
        ctx.counts = (len(combined), len(rounded))
        ctx.save_for_backward(x, *groups, *combined, *rounded, *parts)
        rows = _times(x, parts, shape, transposed, groups, scores is None, along, up, bias)
        return rows if scores is None else sum_copies(rows, groups, scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Compute the gradients.

        With g the row's gradient, that of x is g (W + s B A). Where rows are summed, g is the token's gradient and c
        the copy's score: the gradient of x is c g (W + s B A), and that of c is g (W + s B A) xᵀ + g biasᵀ.
        """
        x, *saved = ctx.saved_tensors
        groups, saved = Groups(*saved[:4]), saved[4:]
        combined, saved = saved[: ctx.counts[0]], saved[ctx.counts[0] :]
        rounded, parts = saved[: ctx.counts[1]], tuple(saved[ctx.counts[1] :])
        scores = combined[0] if combined else None
        of_tokens = scores is not None  # else of rows
        gradient = gradient.contiguous()
        of_x = of_scores = of_a = of_b = left = right = None
        if ctx.dtypes is not None:
            along, down, up = rounded
            left, right = grouped_product(gradient, up.mT, groups, gather=of_tokens), down.mT
            of_a = grouped_outer(left, x, groups, gather=not of_tokens, scores=scores, scale=ctx.scale).mT
            of_b = grouped_outer(along, gradient, groups, gather=of_tokens, scores=scores).to(ctx.dtypes[1])
            of_a = of_a.to(ctx.dtypes[0])
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            rows = _times(gradient, parts, ctx.shape, not ctx.transposed, groups, of_tokens, left, right, None)
            if scores is None:
                of_x = sum_copies(rows, groups)
            else:
                of_x, of_scores = weigh(rows, x, groups, scores)
                if len(combined) > 1:
                    _, chosen, bias = combined
                    of_scores = of_scores + (gradient @ bias.T).gather(1, chosen.to(torch.int64)).to(of_scores.dtype)
                of_scores = of_scores.to(scores.dtype)
        return of_x, of_scores, None, of_a, of_b, None, None, None, None, None, None, None, None, None


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


# A custom operation: if the compiler saw the weights being dequantised, it would save them for the backward pass.
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
    """Dequantise the weights and return the grouped product; their memory is freed afterwards."""
    whole = dequantise(parts, shape, x.dtype)
    return product_operation(x, whole.mT if flipped else whole, groups, gather, left, right, bias)


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
