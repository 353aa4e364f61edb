"""Which activations of a decoder layer are kept until its backward pass."""

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

# Operators whose results are worth keeping, besides those for which torch counts FLOPs: products with adapters and with
# experts, the routing of tokens to experts, and FlashAttention.
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
# A product whose inner dimension is at most this takes no longer to recompute than the operations between products, and
# its factors are smaller than its result. B·A of all experts, which PEFT adds to their weights, is as large as those.
SHORT_SUM = 256
LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # position of the left matrix in the arguments of torch's products


def choose_activation_memory(asked: ActivationMemory, meta_model: MetaModel) -> ActivationMemory:
    """Return the policy ``asked``; for "auto", recompute if the model's code supports it, else keep.

    Raises:
        ConfigurationError: There is no such policy, or the model's code does not support it.
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
    """Make decoder layers keep only what ``policy`` says, from now on.

    transformers' ``gradient_checkpointing_enable`` is not used because it also makes the embedding's output require
    grad. Only reentrant checkpoints need that, and it propagates gradients below the lowest trained weight. Since 5.23
    its checkpoint is also inside a layer's forward, which is compiled here.

    Args:
        layers: The decoder layers of a stage.
        policy: ``keep`` (everything), ``selective`` (the results of matrix products and attention, except low-rank
            products; the rest is recomputed), ``recompute`` (the layer's input), or ``offload`` (that input, in host
            memory).
        device: Where the stage is.
        compiled: Whether layers are compiled. The compiler itself chooses what to keep, much like ``selective``: it
            recomputes what it can fuse into other kernels. ``keep`` and ``selective`` are then the same.
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
    """Mixed into a decoder layer, outside of the compiled code."""

    mixin_place = MixinPlace.MEMORY
    _run: Callable[..., Any] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        if self._run is not None and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            return self._run(call, *args, **kwargs)
        return call(*args, **kwargs)


def _compiled_keeping_inputs(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make the compiler, if it compiles during this call, keep nothing but inputs.

    Unlike a checkpoint around a compiled layer, it recomputes only what the backward pass needs: not the last product,
    a quarter of the layer.
    """
    with functorch_config.patch(activation_memory_budget=0.0):
        return call(*args, **kwargs)


def compile_layers(layers: list[nn.Module]) -> None:
    """Compile each decoder layer separately: one graph for all of a kind, with the shapes of the first micro-batch."""
    leave_functions_to_autograd()
    # Graphs for each kind of layer (attention windows, say), for training and evaluation, and for a ragged last batch.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers:
        layer.compile(dynamic=False)


def _offloaded(run: Callable[..., Any], copies: HostCopies, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    version = hidden_states._version
    with copies.of(hidden_states):
        returned = run(call, *args, **kwargs)
    if hidden_states._version != version:  # overwritten during the copy; autograd does not check what hooks keep
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
