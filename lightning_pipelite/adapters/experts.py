"""LoRA layers of PEFT on fused experts, many in one parameter, in full precision or in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, is_parametrized
from typing_extensions import override

from lightning_pipelite.kernels.experts import Factors
from lightning_pipelite.models.experts import compute, follows_interface, is_covered, share_class
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in


def wrap_experts(model: nn.Module, name: str, parameter: str, config: LoraConfig, adapter: str) -> ParamWrapper:
    """Put a LoRA layer around the module ``name`` that adapts its fused weight ``parameter`` [experts, ., .].

    Several weights of one module are wrapped one around the other; PEFT, when it loads, does so in the order in which
    the module registers them.

    Args:
        model: Holds the module; changed in place.
        name: The module's name.
        parameter: The weight's name in it, in full precision or quantised by bitsandbytes' parametrization.
        config: Rank and scale.
        adapter: Name of the adapter.

    Returns:
        The layer, whose A and B are still on the meta device.
    """
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    innermost = module.get_base_layer() if isinstance(module, ParamWrapper) else module
    kind = _QuantisedExperts if is_parametrized(innermost, parameter) else ParamWrapper
    with torch.device("meta"):
        wrapper = kind(module, adapter, parameter, config=config, r=config.r, lora_alpha=config.lora_alpha)
    setattr(model.get_submodule(parent), child, wrapper)
    return wrapper


def fuse_experts(model: nn.Module, adapter: str) -> None:
    """Let PEFT's layers around experts compute by grouped products, and never form a product of A and B.

    PEFT's own forward remains for experts that :mod:`~lightning_pipelite.models.experts` does not cover, and for
    adapters that are merged or switched off.

    Args:
        model: Holds the layers.
        adapter: The adapter's name in them.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inside = {id(wrapper.base_layer) for wrapper in wrappers}
    for wrapper in wrappers:
        experts = wrapper.get_base_layer()
        if id(wrapper) not in inside and follows_interface(experts) and is_covered(experts):
            share_class(experts)
            mix_in(wrapper, _GroupedLoRA)
            wrapper.__dict__["_adapter"] = adapter


class _GroupedLoRA(Mixin):
    """Mixed into the outermost layer around experts: computes for all."""

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
    """A and B as PEFT reads them: A's rows are those of one expert after the other, B's columns go round."""
    a, b, experts = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.num_experts
    a = a.view(experts, -1, a.shape[1])
    return Factors(a, b.view(b.shape[0], -1, experts).permute(2, 0, 1), layer.scaling[adapter])


class _QuantisedExperts(ParamWrapper):
    """Adds the adapter's product to experts that a parametrization keeps in 4 bits.

    PEFT's own way stacks a parametrization on the one of bitsandbytes, but asks for the weight in between, which
    bitsandbytes' cache then hands out without the adapter: it would not train. Nor is it taken off again.
    """

    @override
    def get_param(self) -> Tensor:
        """Return an empty tensor of the weight's shape, dtype and device: PEFT asks for no more here."""
        original = self._chain().original
        state = self._chain()[0].quant_state
        return torch.empty((), dtype=state.dtype, device=original.device).expand(state.shape)

    @contextmanager
    @override
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        (adapter,) = active_adapters
        chain = self._chain()
        chain.append(_AddProduct(*self.get_delta_factors(adapter)))
        try:
            with cached():
                yield
        finally:  # also where a recomputation stops early, by an exception
            del chain[-1]

    def _chain(self) -> Any:
        return self.get_base_layer().parametrizations[self.parameter_name]


class _AddProduct(nn.Module):
    """W + scale · left @ right, for each expert."""

    def __init__(self, left: Tensor, right: Tensor, scale: float) -> None:
        super().__init__()
        self.left, self.right, self.scale = left, right, scale

    def forward(self, weight: Tensor) -> Tensor:
        return torch.baddbmm(weight, self.left, self.right, alpha=self.scale)
