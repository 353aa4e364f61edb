"""What a causal LM does in one forward, seen without weights and without computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils


@dataclass
class Trace:
    """What was seen.

    Attributes:
        order: Names of the watched modules and layers, in the order of their calls.
        side_inputs: What reaches a layer beside the hidden states and would need a gradient sent back.
        returns_tuple: For each kind of layer output that was seen, whether it is a tuple.
        masks: How many attention masks were built.
        packed_masks: How many of them keep packed documents apart by their positions.
    """

    order: list[str] = field(default_factory=list)
    side_inputs: set[str] = field(default_factory=set)
    returns_tuple: set[bool] = field(default_factory=set)
    masks: int = 0
    packed_masks: int = 0


def trace_forward(model: PreTrainedModel, layer_names: Sequence[str], other_names: Sequence[str]) -> Trace:
    """Run one forward of fake tensors [1, 8] through a model on the meta device, called as a stage calls it.

    Args:
        model: A causal LM on the meta device.
        layer_names: Names of its decoder layers.
        other_names: Names of further modules whose calls are of interest.

    Raises:
        Exception: Whatever the model raises.
    """
    trace = Trace()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.order.append(name)
            if name not in layer_names:
                return
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                trace.side_inputs.add("hidden states that are not [batch, seq, hidden]")
            rest = {**{f"argument {i}": v for i, v in enumerate(args) if i}, **kwargs}
            trace.side_inputs.update(key for key, v in rest.items() if v is not hidden and _carries_gradient(v))

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trace.returns_tuple.add(isinstance(output, tuple))

    handles = []
    for name in (*layer_names, *other_names):
        handles.append(model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True))
    for name in layer_names:
        handles.append(model.get_submodule(name).register_forward_hook(after))
    # transformers builds every mask through the first of these, and through the second only if it is given positions.
    masks = patch.object(masking_utils, "_preprocess_mask_arguments", wraps=masking_utils._preprocess_mask_arguments)
    packed = patch.object(
        masking_utils, "find_packed_sequence_indices", wraps=masking_utils.find_packed_sequence_indices
    )
    try:
        with masks as mask_calls, packed as packed_calls, FakeTensorMode(allow_non_fake_inputs=True):
            input_ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
            position_ids = torch.arange(8, device="meta")[None]
            model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    trace.masks, trace.packed_masks = mask_calls.call_count, packed_calls.call_count
    return trace


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(_carries_gradient, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_carries_gradient, value))
