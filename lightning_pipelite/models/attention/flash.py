"""torch's FlashAttention over sequences of different lengths, also with sinks, which the kernel does not know.

A sink is a score for each head that takes its share of the probabilities and gives no value (gpt-oss). With the
log-sum-exp L of a token's scores, which the kernel returns, and L' = log(exp(L) + exp(sink)), all probabilities are
exp(L - L') times those without it, and so is the output. The kernel's backward pass makes the probabilities anew as
exp(score - L) and takes from their gradients the product of output and gradient (Dao 2023, "FlashAttention-2",
https://arxiv.org/abs/2307.08691, algorithm 2): given L' and the output with the sink, its gradients are those with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Since torch 2.12 grouped heads must be asked for; before, there is no such option and they just work.
GROUPED: dict[str, Any] = {"enable_gqa": True} if TorchVersion(torch.__version__) >= "2.12" else {}


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
    # Where it is needed: with it comes torch's compiler, which takes two seconds. It registers the kernel's operations.
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    if sinks is not None:
        output, _ = torch.ops.pipelite.sink_attention(query, key, value, sinks, bounds, length, scale, left)
    else:
        output = varlen_attn(
            query, key, value, bounds, bounds, length, length, scale=scale, window_size=(left, 0), **GROUPED
        )
    assert isinstance(output, Tensor)
    return output


# Operations, and no autograd.Function: torch 2.11 compiles wrong gradients of one whose forward ends in a call that
# returns what it is given (here ``to`` of the same dtype): backward is given zeros. torch 2.13 does not.
_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define(
    "sink_attention(Tensor query, Tensor key, Tensor value, Tensor sinks, Tensor bounds, int length, float scale, "
    "int left) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "sink_attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor sinks, Tensor bounds, "
    "Tensor output, Tensor total, int length, float scale, int left, bool to_sinks) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "sink_attention", "CompositeExplicitAutograd")
def forward_operation(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, length: int, scale: float, left: int
) -> tuple[Tensor, Tensor]:
    """Attend with sinks, as one operation: the output and L'.

    By the operations that torch's function is made of: its autograd passes over the gradient of L. Remove when it no
    longer does (it does from torch 2.11 to 2.13).
    """
    output, without, _ = torch.ops.torch_attn._varlen_attn(
        query, key, value, bounds, bounds, length, length, left < 0, scale, [left, 0]
    )
    total = torch.logaddexp(without, sinks.to(without.dtype)[:, None])
    return (output * (without - total).exp().mT[..., None]).to(query.dtype).contiguous(), total


@torch.library.register_fake("pipelite::sink_attention", lib=_LIBRARY)
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, length: int, scale: float, left: int
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.impl(_LIBRARY, "sink_attention_backward", "CompositeExplicitAutograd")
def backward_operation(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, output: Tensor,
    total: Tensor, length: int, scale: float, left: int, to_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of query, key, value and sinks (nothing if they need none), as one operation."""
    without_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of its random numbers
    of_query, of_key, of_value = torch.ops.torch_attn._varlen_attn_backward(
        gradient, query, key, value, output, total, bounds, bounds, length, length, left < 0, without_dropout, scale,
        [left, 0],
    )  # fmt: skip
    of_sinks = sinks.new_empty(0)
    if to_sinks:
        shares = (sinks.to(total.dtype)[:, None] - total).exp()
        of_sinks = -(shares * (gradient.to(total.dtype) * output).sum(-1).mT).sum(-1).to(sinks.dtype)
    return of_query.contiguous(), of_key.contiguous(), of_value.contiguous(), of_sinks


@torch.library.register_fake("pipelite::sink_attention_backward", lib=_LIBRARY)
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, output: Tensor,
    total: Tensor, length: int, scale: float, left: int, to_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_query, of_key, of_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return of_query, of_key, of_value, sinks.new_empty(sinks.shape if to_sinks else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.numbers = inputs[5:]


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    to_sinks = ctx.needs_input_grad[3]
    gradients = torch.ops.pipelite.sink_attention_backward(gradient, *ctx.saved_tensors, *ctx.numbers, to_sinks)
    return *gradients[:3], gradients[3] if to_sinks else None, None, None, None, None


torch.library.register_autograd("pipelite::sink_attention", _differentiate, setup_context=_keep, lib=_LIBRARY)
