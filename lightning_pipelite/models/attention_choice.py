"""Chooses the attention implementation of a stage."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.attention import varlen
from lightning_pipelite.models.meta_model import MetaModel

Attention = Literal["auto", "varlen", "sdpa", "eager"]


def check_attention(meta_model: MetaModel, asked: Attention) -> None:
    """Refuse varlen for a model whose attention it does not support.

    Raises:
        ConfigurationError: ``asked`` is varlen for such a model.
    """
    if asked == varlen.NAME and not meta_model.fits_varlen():
        raise ConfigurationError(
            f"{meta_model.model_dir}: varlen does not support the attention of a model of type "
            f"{meta_model.config.model_type}; set attn_implementation to auto."
        )


def attention_on(
    device: torch.device, asked: Attention, meta_model: MetaModel, dtype: torch.dtype, *, packed: bool
) -> str | None:
    """Return the ``attn_implementation`` of a stage on ``device``; None for transformers' choice.

    "auto" is varlen for packed documents if torch has the kernel and the kernel supports the model's attention. If
    only the model is the obstacle, this warns that masks are slow.
    """
    if asked != "auto":
        return asked
    if not packed or not varlen.has_kernel(device, dtype):
        return None
    if meta_model.fits_varlen():
        return varlen.NAME
    if device.type == "meta":  # planning: every trial would repeat the warning
        return None
    warnings.warn(
        f"{meta_model.model_dir}: packed documents are kept apart by masks, which is slow for long sequences, because "
        f"FlashAttention does not support the attention of a model of type {meta_model.config.model_type}.",
        stacklevel=2,
    )
    return None
