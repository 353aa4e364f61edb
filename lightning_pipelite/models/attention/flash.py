"""torch's FlashAttention over sequences of different lengths, extended by sinks, which the kernel does not support.

A sink is a score for each head that takes a share of the probabilities but contributes no value (gpt-oss). Let L be the
log-sum-exp of a token's scores, which the kernel returns, and L' = log(exp(L) + exp(sink)). With the sink, all
probabilities, and so the output, are exp(L - L') times those without it. The kernel's backward pass recomputes the
probabilities as exp(score - L) and subtracts the product of output and gradient from their gradients (Dao 2023,
"FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 2). Given L' and the output with the sink, it therefore
computes the gradients with the sink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Grouped heads need this option since torch 2.12; earlier versions lack it and always support them.
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
        query: [tokens, heads, head size]: all sequences concatenated.
        key: [tokens, key heads, head size].
        value: [tokens, key heads, head size].
        bounds: Starts of the sequences, padded with the total number of tokens: int32.
        length: The most tokens that a sequence may have.
        scale: Factor of the scores.
        window: How many tokens a token sees, including itself; None for all up to itself.
        sinks: [heads]; None for none.

    Returns:
        [tokens, heads, head size].
    """
    # Imported here, as it imports torch's compiler, which takes two seconds. It registers the kernel's operators.
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


# Custom operators, not an autograd.Function: torch 2.11 compiles wrong gradients for a Function whose forward ends in a
# call that returns its input (here ``to`` with the same dtype): backward receives zeros. torch 2.13 is correct.
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
    """Attend with sinks, as one operator: return the output and L'.

    It calls the operators beneath torch's ``varlen_attn``, whose autograd ignores the gradient of L (torch 2.11 to
    2.13). Remove when it no longer does.
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
    """Compute the gradients of query, key, value and sinks (empty if they need none), as one operator."""
    without_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the RNG state of dropout
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
