"""Attention over packed documents without a mask: torch's FlashAttention for sequences of different lengths.

With a mask of sequence x sequence values, scaled dot-product attention uses slower kernels, and computes every pair of
tokens, even of different documents. Here the bounds of the documents replace the mask.

cuDNN's attention, which torch chooses for a single document and which takes half of FlashAttention's time on a Hopper
GPU, is no option for several: with bounds, torch 2.11 (cuDNN 9.19) builds a new plan in each call, which takes 50 ms on
the host, and the gradients are wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lightning_pipelite.models.attention import flash
from lightning_pipelite.models.attention.document_mask import Documents, current_documents

NAME = "varlen"
LARGEST_HEAD = 256  # of FlashAttention
# The other implementations, whose masks keep documents apart: see ``document_mask.py``.
OF_TRANSFORMERS = ("sdpa", "eager")
UNKNOWN = ("softcap", "position_bias", "cache")  # what a layer may require and FlashAttention does not support


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has a kernel: for bf16 and fp16, on NVIDIA GPUs since Ampere; meta stands for one."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "meta":
        return half
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device)[0] >= 8


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document of :func:`~lightning_pipelite.models.attention.document_mask.document_mask`.

    This is an attention function for transformers. Whether a class of models requires nothing more is found by a trial,
    see ``MetaModel.fits_varlen``. A layer's window, for example, is given both by a mask and by a number, and only the
    number counts here.

    Args:
        module: The attention layer.
        query: [batch, heads, seq, head size].
        key: [batch, key heads, seq, head size].
        value: [batch, key heads, seq, value size].
        attention_mask: None, as no mask is built.
        dropout: Dropout of the probabilities, which must be 0.
        scaling: Factor of the scores; 1 / sqrt(head size) if None.
        sliding_window: How many tokens a token sees, including itself; None for all up to itself.
        is_causal: Whether tokens see no later tokens, which must hold; None for yes.
        s_aux: Sinks, see :mod:`~lightning_pipelite.models.attention.flash`: [heads]; None for none.
        asked: Further arguments of a layer.

    Returns:
        [batch, seq, heads, value size], and None in place of the probabilities.

    Raises:
        NotImplementedError: A layer requires something that is not supported.
    """
    unknown = [name for name in UNKNOWN if asked.get(name) is not None]
    causal = is_causal is not False and getattr(module, "is_causal", True)
    if unknown or attention_mask is not None or not causal or dropout or query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"varlen does not support {', '.join(unknown) or 'masks, dropout or a cache'}")
    documents = current_documents()
    window = None if sliding_window is None or sliding_window >= query.shape[2] else sliding_window
    if documents is None and window is None and s_aux is None:
        grouped = query.shape[1] != key.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scaling, is_causal=query.shape[2] > 1, enable_gqa=grouped
        )
        return output.transpose(1, 2).contiguous(), None
    head = max(query.shape[-1], value.shape[-1])
    if has_kernel(query.device, query.dtype) and head <= LARGEST_HEAD:
        return _kernel(query, key, value, documents, scaling, window, s_aux), None
    return _masked(query, key, value, documents, scaling, window, s_aux), None


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, scaling: float | None, window: int | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    batch, heads, length, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    head = -(-max(size, value.shape[-1]) // 8) * 8  # the kernel requires equal sizes, multiples of 8

    def in_a_row(tensor: Tensor) -> Tensor:
        rows = tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], tensor.shape[3])
        return nn.functional.pad(rows, (0, head - rows.shape[-1])) if rows.shape[-1] < head else rows

    if documents is None:
        bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    else:
        bounds = documents.bounds
    output = flash.attend(
        in_a_row(query), in_a_row(key), in_a_row(value), bounds, length, scale=scaling, window=window, sinks=sinks
    )
    return output[..., : value.shape[-1]].reshape(batch, length, heads, value.shape[-1])


def _masked(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, scaling: float | None, window: int | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute the same with a mask: on a CPU, in float32, and for heads that are too large."""
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if documents is not None:
        numbers = documents.numbers
        seen = seen & (numbers[:, None, :, None] == numbers[:, None, None, :])
    grouped = query.shape[1] != key.shape[1]
    mask = seen
    if sinks is not None:  # as the scores of one more key of zeros, whose value is zeros
        key, value = (nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
        shape = (query.shape[0], query.shape[1], query.shape[2])
        scores = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf).expand(*shape, -1)
        mask = torch.cat([scores, sinks.to(query.dtype)[:, None, None].expand(*shape, 1)], dim=-1)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2).contiguous()


def register() -> None:
    """Register :func:`varlen_attention` with transformers; further calls have no effect.

    transformers has no mask builder of this name, so it builds no mask and does not look for packed documents, which
    would synchronise the host in every micro-batch.
    """
    AttentionInterface.register(NAME, varlen_attention)
