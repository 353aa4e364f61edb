"""FlashAttention's operations in plain torch for the CPU, where torch does not implement them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pipelite.models.attention import varlen


@contextlib.contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Make varlen attention take the GPU path on the CPU, in float32."""
    with torch.library._scoped_library("aten", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        patch.setattr(varlen, "has_kernel", lambda *_: True)
        yield


def _scores(query: Tensor, key: Tensor, scale: float, left: int) -> Tensor:
    """Return the masked scores of one sequence, [heads, tokens, tokens]."""
    place = torch.arange(query.shape[0])
    distance = place[:, None] - place
    seen = (distance >= 0) & ((distance <= left) | (left < 0))
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    return scores.masked_fill(~seen, -torch.inf)


def _forward(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *_: Any, scale: float, **named: Any) -> Any:
    output, sums, group = torch.empty_like(query), query.new_empty(query.shape[1::-1]), query.shape[1] // key.shape[1]
    for first, after in pairwise(bounds.tolist()):
        q, k, v = (t[first:after] for t in (query, *(t.repeat_interleave(group, 1) for t in (key, value))))
        scores = _scores(q, k, scale, named["window_size_left"])
        output[first:after] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        sums[:, first:after] = scores.logsumexp(-1)
    return output, sums, torch.zeros(2, dtype=torch.uint64), torch.empty(()), torch.empty(0)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, bounds: Tensor,
    *_: Any, scale: float, **named: Any,
) -> Any:  # fmt: skip
    """Apply algorithm 2 of FlashAttention-2, which has only output and log-sum-exp from the forward pass."""
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    of_query, of_key, of_value = (torch.zeros_like(query) for _ in range(3))
    for first, after in pairwise(bounds.tolist()):
        own = slice(first, after)
        g, q, o = gradient[own], query[own], output[own]
        k, v = (t[own].repeat_interleave(group, 1) for t in (key, value))
        shares = (_scores(q, k, scale, named["window_size_left"]) - sums[:, own, None]).exp()
        of_shares = torch.einsum("qhd,khd->hqk", g, v)
        of_scores = scale * shares * (of_shares - (g * o).sum(-1).mT[..., None])
        of_value[own] = torch.einsum("hqk,qhd->khd", shares, g)
        of_query[own] = torch.einsum("hqk,khd->qhd", of_scores, k)
        of_key[own] = torch.einsum("hqk,qhd->khd", of_scores, q)
    return of_query, *(t.unflatten(1, (heads, group)).sum(2) for t in (of_key, of_value))
