"""torch's FlashAttention over sequences of different lengths, also with sinks, which the kernel does not know.

A sink is a score for each head that takes its share of the probabilities and gives no value (gpt-oss). With the
log-sum-exp L of a token's scores, which the kernel returns, and L' = log(exp(L) + exp(sink)), all probabilities are
exp(L - L') times those without it, and so is the output. The kernel's backward pass makes the probabilities anew as
exp(score - L) and takes from their gradients the product of output and gradient (Dao 2023, "FlashAttention-2",
https://arxiv.org/abs/2307.08691, algorithm 2): given L' and the output with the sink, its gradients are those with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    length: int,
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend causally within each sequence.

    Args:
        query: [tokens, heads, head size]: all sequences on end.
        key: [tokens, key heads, head size].
        value: [tokens, key heads, head size].
        bounds: Where sequences begin, then the end, as often as there is room: int32.
        length: The most tokens that a sequence may have.
        scale: Of the scores.
        window: How many tokens a token sees, itself included; None for all before it.
        sinks: [heads]; None for none.

    Returns:
        [tokens, heads, head size].
    """
    left = -1 if window is None else window - 1
    kernel = _varlen_attn()  # which registers the operations that it is made of, too
    if sinks is not None:
        output = _WithSinks.apply(query, key, value, sinks, bounds, length, scale, left)
    else:
        output = kernel(query, key, value, bounds, bounds, length, length, scale=scale, window_size=(left, 0))
    assert isinstance(output, Tensor)
    return output


@cache
def _varlen_attn() -> Callable[..., Any]:
    """Import torch's function where it is needed: with it comes torch's compiler, which takes two seconds."""
    from torch.nn.attention.varlen import varlen_attn

    # Since torch 2.12 grouped heads must be asked for; before, there is no such option and they just work.
    asks = "enable_gqa" in signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if asks else varlen_attn


class _WithSinks(torch.autograd.Function):
    """Calls the operations that torch's function is made of: by autograd it passes over the gradient of L.

    Remove when it no longer does (it does from torch 2.11 to 2.13), and take L from it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, length: int, scale: float,
        left: int,
    ) -> Tensor:  # fmt: skip
        output, without, _ = torch.ops.torch_attn._varlen_attn(
            query, key, value, bounds, bounds, length, length, left < 0, scale, [left, 0]
        )
        total = torch.logaddexp(without, sinks.to(without.dtype)[:, None])
        output = (output * (without - total).exp().mT[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, bounds, output, total)
        ctx.length, ctx.scale, ctx.left = length, scale, left
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        query, key, value, sinks, bounds, output, total = ctx.saved_tensors
        without_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of its random numbers
        gradients = torch.ops.torch_attn._varlen_attn_backward(
            gradient, query, key, value, output, total, bounds, bounds, ctx.length, ctx.length, ctx.left < 0,
            without_dropout, ctx.scale, [ctx.left, 0],
        )  # fmt: skip
        of_sinks = None
        if ctx.needs_input_grad[3]:
            shares = (sinks.to(total.dtype)[:, None] - total).exp()
            of_sinks = -(shares * (gradient.to(total.dtype) * output).sum(-1).mT).sum(-1).to(sinks.dtype)
        return (*gradients, of_sinks, None, None, None, None)
