"""What is kept of a decoder layer's activations until its backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.attention.document_mask import documents_when_recomputed
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.offload import HostCopies
from lightning_pipelite.models.torch_compat import leave_functions_to_autograd
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in

ActivationMemory = Literal["auto", "keep", "selective", "recompute", "offload"]

# What is worth keeping, beside what torch counts the arithmetic of: products with adapters, those of experts and where
# tokens go, and FlashAttention.
KEPT_NAMES = (
    "pipelite::lora_linear",
    "pipelite::fp8_product",
    "pipelite::sort_by_expert",
    "pipelite::grouped_product",
    "pipelite::grouped_product_4bit",
    "pipelite::sink_attention",
    "torch_attn::_varlen_attn",
    "aten::_grouped_mm",
    "transformers::grouped_mm_fallback",
)
# Where a product sums over so few, computing it again takes no longer than what lies between products, and the two
# that it is made of are smaller. B·A of all experts, where PEFT adds it to their weights, is as large as these.
SHORT_SUM = 256
LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which argument of torch's products is the left matrix


def choose_activation_memory(asked: ActivationMemory, meta_model: MetaModel) -> ActivationMemory:
    """Return the policy ``asked`` for; for "auto", recompute where the model's code can do so, else keep.

    Raises:
        ConfigurationError: There is no such policy, or the model's code cannot follow it.
    """
    if asked not in get_args(ActivationMemory):
        choices = ", ".join(get_args(ActivationMemory))
        raise ConfigurationError(f"activation_memory is {asked!r}; set it to one of {choices}.")
    if asked == "auto":
        return "recompute" if meta_model.can_recompute else "keep"
    if asked != "keep" and not meta_model.can_recompute:
        raise ConfigurationError(
            f"{meta_model.model_dir}: a model of type {meta_model.config.model_type} cannot recompute its layers; set "
            "activation_memory to keep."
        )
    return asked


def set_activation_memory(layers: Iterable[nn.Module], policy: str, device: torch.device, *, compiled: bool) -> None:
    """Let decoder layers keep no more than ``policy`` says, from now on.

    Not transformers' gradient_checkpointing_enable: that also makes the embedding's output require grad, which only
    reentrant checkpoints need and which sends gradients below the lowest trained weight; and since 5.23 it stands in a
    layer's forward, which is compiled.

    Args:
        layers: A stage's.
        policy: ``keep`` (everything), ``selective`` (the results of matrix products and of attention, but for products
            of low rank; the rest is computed again), ``recompute`` (the layer's input), or ``offload`` (that, in the
            host's memory).
        device: Where the stage is.
        compiled: Whether layers are compiled. The compiler chooses what to keep of a layer as ``selective`` does, and
            keeps nothing that it can make anew from that in passing; the two are then the same.
    """
    run: Callable[..., Any] | None
    if policy == "keep" or (policy == "selective" and compiled):
        run = None
    elif compiled:
        run = _compiled_keeping_inputs
    else:
        contexts = _keeping_products if policy == "selective" else documents_when_recomputed
        run = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    if run is not None and policy == "offload" and device.type == "cuda":
        run = partial(_offloaded, run, HostCopies(device))
    for layer in layers:
        if run is not None and not isinstance(layer, _MemoryPolicy):
            mix_in(layer, _MemoryPolicy)
        if isinstance(layer, _MemoryPolicy):
            layer.__dict__["_run"] = run


class _MemoryPolicy(Mixin):
    """Mixed into a decoder layer, outside of what is compiled."""

    mixin_place = MixinPlace.MEMORY
    _run: Callable[..., Any] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        if self._run is not None and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            return self._run(call, *args, **kwargs)
        return call(*args, **kwargs)


def _compiled_keeping_inputs(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let the compiler, should it compile now, keep nothing but inputs.

    Unlike a checkpoint around a compiled layer, what it computes again is what the backward pass needs: not the last
    product, a quarter of the layer.
    """
    with functorch_config.patch(activation_memory_budget=0.0):
        return call(*args, **kwargs)


def compile_layers(layers: list[nn.Module]) -> None:
    """Compile each decoder layer by itself: one graph for all of a kind, with the shapes of the first micro-batch."""
    leave_functions_to_autograd()
    # Layers of different kinds (attention windows, say), in training and evaluation, for a ragged last batch as well.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers:
        layer.compile(dynamic=False)


def _offloaded(run: Callable[..., Any], copies: HostCopies, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    version = hidden_states._version
    with copies.of(hidden_states):
        returned = run(call, *args, **kwargs)
    if hidden_states._version != version:  # while it was being copied; autograd does not look at what hooks keep
        raise RuntimeError("a decoder layer overwrites its input; set activation_memory to keep")
    return returned


def _keeping_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    again, seen = documents_when_recomputed()
    first, second = create_selective_checkpoint_contexts(_policy)
    return _both(again, first), _both(seen, second)


@contextlib.contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Any:
    with outer, inner:
        yield


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split(".")[0]
    kept = operation.overloadpacket in flop_registry or name in KEPT_NAMES
    left = LEFT.get(name.removeprefix("aten::"))
    if left is not None and args[left].shape[-1] <= SHORT_SUM:
        kept = False
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
