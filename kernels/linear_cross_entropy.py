"""The output head fused with its cross-entropy, a chunk of tokens at a time: the full logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.kernels.cross_entropy import cross_entropy_, cross_entropy_reference_
from lightning_pipelite.kernels.device import runs_triton
from lightning_pipelite.kernels.scale import scale_

MAX_LOGITS_BYTES = 256 * 2**20
TILE = 256
"""A GPU's matrix products compute a multiple of this many rows, needed or not: the largest tile of cuBLAS's kernels."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> Tensor:
    """Return the summed cross-entropy of ``hidden @ weight.T + bias``.

    The gradients are computed in the forward pass, as the logits are gone by the backward pass. Those of ``weight``,
    ``rows`` and ``bias`` are accumulated over all chunks in float32, so that small contributions are not lost.

    Args:
        hidden: [..., size], float32, bfloat16 or float16.
        weight: [vocabulary, size], of the same dtype.
        labels: [...], int64; -100 for a token without loss.
        bias: [vocabulary].
        scale: Factor of the logits; positive.
        softcap: Their limit after that, see :func:`~lightning_pipelite.kernels.cross_entropy.cross_entropy_`.
        rows: Numbers of some rows of ``weight``, int64 and unique, and the values that replace them, [rows, size] of
            any floating dtype: trains these rows without a gradient, or a copy, of the whole weight.
        max_logits_bytes: Limit of the size of a chunk's logits; a chunk has at least one token.

    Returns:
        A float32 scalar, for a single backward pass.

    Raises:
        ValueError: The shapes do not fit, or the scale is not positive.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} "
            "have incompatible shapes"
        )
    numbers, values = rows if rows is not None else (labels.new_empty(0), None)
    total: Tensor = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), bias, values, numbers, scale, softcap, max_logits_bytes
    )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        numbers: Tensor,
        scale: float,
        softcap: float | None,
        max_logits_bytes: int,
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias, needs_values, *_ = ctx.needs_input_grad
        gradient = needs_hidden or needs_weight or needs_bias or needs_values
        compute = cross_entropy_ if runs_triton(hidden) or hidden.is_meta else cross_entropy_reference_
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        of_values = torch.zeros_like(values, dtype=torch.float32) if needs_values and values is not None else None
        apart = None if values is None else values.to(weight.dtype)
        losses = [torch.zeros(1, dtype=torch.float32, device=hidden.device)]  # a sum exists even without tokens
        rows = max(1, max_logits_bytes // (weight.shape[0] * hidden.element_size()))
        if rows > TILE:  # 1046 rows took an H100 a quarter longer than 958
            rows -= rows % TILE
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            if apart is not None:
                theirs = torch.nn.functional.linear(hidden[part], apart, None if bias is None else bias[numbers])
                logits.index_copy_(1, numbers, theirs)
            losses.append(compute(logits, labels[part], scale=scale, softcap=softcap, gradient=gradient))
            # The logits are their own gradient now.
            if of_bias is not None:
                of_bias += logits.sum(dim=0, dtype=torch.float32)
            if gradient and apart is not None:  # the weight's own values of these rows take no part
                theirs = logits.index_select(1, numbers)
                logits.index_fill_(1, numbers, 0)
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[part])
                if apart is not None:
                    of_hidden[part].addmm_(theirs, apart)
            if of_weight is not None:
                _add_product(of_weight, logits, hidden[part])
            if of_values is not None:
                _add_product(of_values, theirs, hidden[part])
            del logits  # before the next chunk's are made
        ctx.of = of_hidden, of_weight, of_bias, of_values
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias, values)]
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (factor,) = gradients
        if ctx.of is None:
            raise RuntimeError("linear_cross_entropy supports one backward pass only, without retain_graph")
        hidden, *others = (None if of is None else scale_(of, factor) for of in ctx.of)
        ctx.of = None  # autograd would copy gradients that are still referenced here
        weight, bias, values = (
            None if of is None else of.to(dtype) for of, dtype in zip(others, ctx.dtypes, strict=True)
        )
        return hidden, weight, None, bias, values, None, None, None, None


def _add_product(sum_: Tensor, logits: Tensor, hidden: Tensor) -> None:
    """Add ``logits.T @ hidden``, accumulated in float32, to a float32 sum."""
    if logits.dtype == torch.float32:
        sum_.addmm_(logits.T, hidden)
    elif logits.is_cuda or logits.is_meta:
        sum_ += torch.mm(logits.T, hidden, out_dtype=torch.float32)
    else:
        sum_.addmm_(logits.float().T, hidden.float())
