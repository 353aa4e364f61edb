"""PEFT's LoRA layers on fused experts, many in one parameter, in full precision or in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_pipelite.adapters.peft_compat import QuantisedExperts, expert_factors
from lightning_pipelite.kernels.experts import Factors
from lightning_pipelite.models.experts import compute, follows_interface, is_covered, prepare
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in


def wrap_experts(model: nn.Module, name: str, parameter: str, config: LoraConfig, adapter: str) -> ParamWrapper:
    """Put a LoRA layer around the module ``name`` that adapts its fused weight ``parameter`` [experts, ., .].

    The layers of several weights of one module are nested; PEFT, when it loads, nests them in the order in which the
    module registers the weights.

    Args:
        model: Holds the module; changed in place.
        name: The module's name.
        parameter: The weight's name in it, in full precision or quantised by bitsandbytes' parametrization.
        config: Rank and scale.
        adapter: Name of the adapter.

    Returns:
        The layer, with A and B still on the meta device.
    """
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    innermost = module.get_base_layer() if isinstance(module, ParamWrapper) else module
    kind = QuantisedExperts if is_parametrized(innermost, parameter) else ParamWrapper
    with torch.device("meta"):
        wrapper = kind(module, adapter, parameter, config=config, r=config.r, lora_alpha=config.lora_alpha)
    setattr(model.get_submodule(parent), child, wrapper)
    return wrapper


def fuse_experts(model: nn.Module, adapter: str) -> None:
    """Make PEFT's layers around experts compute by grouped products, which never materialise a product of A and B.

    PEFT's own forward remains in use for experts that :mod:`~lightning_pipelite.models.experts` does not cover, and for
    adapters that are merged or disabled.

    Args:
        model: Holds the layers.
        adapter: The adapter's name in them.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inside = {id(wrapper.base_layer) for wrapper in wrappers}
    for wrapper in wrappers:
        experts = wrapper.get_base_layer()
        if id(wrapper) not in inside and follows_interface(experts) and is_covered(experts):
            prepare(experts)
            mix_in(wrapper, _GroupedLoRA)
            wrapper.__dict__["_adapter"] = adapter


class _GroupedLoRA(Mixin):
    """Mixed into the outermost layer around experts; computes for all nested ones."""

    mixin_place = MixinPlace.COMPUTATION
    _adapter: str

    def __call__(self, hidden_states: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        factors = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if layer.disable_adapters or layer.merged:
                return super().__call__(hidden_states, chosen, scores)  # type: ignore[misc]
            factors[layer.parameter_name] = _factors(layer, self._adapter)
            layer = layer.base_layer
        return compute(layer, hidden_states, chosen, scores, factors)


def _factors(layer: Any, adapter: str) -> Factors:
    a, b = expert_factors(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.num_experts)
    return Factors(a, b, layer.scaling[adapter])
