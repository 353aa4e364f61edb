"""What is kept of a decoder layer's activations until its backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from lightning_pipelite.models.offload import HostCopies
from lightning_pipelite.models.packing import documents_when_recomputed

ActivationMemory = Literal["auto", "keep", "selective", "recompute", "offload"]

# What is worth keeping, beside what torch counts the arithmetic of: products with adapters, and FlashAttention.
KEPT_NAMES = ("pipelite::lora_linear", "torch_attn::_varlen_attn")


def set_activation_memory(model: PreTrainedModel, policy: str, device: torch.device, *, compiled: bool) -> None:
    """Let the decoder layers of a stage keep no more than ``policy`` says.

    Args:
        model: the stage's model.
        policy: ``keep`` (everything), ``selective`` (the results of matrix products and of attention; the rest is
            computed again), ``recompute`` (the layer's input), or ``offload`` (that, in the host's memory).
        device: where the stage is.
        compiled: whether layers are compiled. The compiler chooses what to keep of a layer as ``selective`` does, and
            keeps nothing that it can make anew from that in passing; the two are then the same.
    """
    if policy == "keep" or (policy == "selective" and compiled):
        return
    run_again: Callable[..., Any] = partial(checkpoint, use_reentrant=False, context_fn=documents_when_recomputed)
    if policy == "selective":
        run_again = partial(checkpoint, use_reentrant=False, context_fn=_keeping_products)
    if policy == "offload" and device.type == "cuda":
        run_again = partial(_offloaded, run_again, HostCopies(device))
    # Not gradient_checkpointing_enable: that also makes the embedding's output require grad, which only reentrant
    # checkpoints need and which sends gradients below the lowest trained weight.
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run_again)


def compile_layers(layers: list[nn.Module]) -> None:
    """Compile each decoder layer by itself: one graph for all of a kind, with the shapes of the first micro-batch."""
    # Layers of different kinds (attention windows, say), in training and evaluation, for a ragged last batch as well.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers:
        layer.compile(dynamic=False)


def _offloaded(run: Callable[..., Any], copies: HostCopies, *args: Any, **kwargs: Any) -> Any:
    with copies:  # for what the checkpoint keeps; within it, it keeps nothing
        return run(*args, **kwargs)


def _keeping_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    again, seen = documents_when_recomputed()
    first, second = create_selective_checkpoint_contexts(_policy)
    return _both(again, first), _both(seen, second)


@contextlib.contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Any:
    with outer, inner:
        yield


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.overloadpacket in flop_registry or operation.name().split(".")[0] in KEPT_NAMES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
