"""Every undocumented part of PEFT that is used: what it is for, and when its use can be removed.

Tested with PEFT 0.21.0 to 0.21.2; pyproject.toml allows later versions, for which
``tests/adapters/test_peft_compat.py`` names whatever has gone. Other files use only what ``peft``, ``peft.tuners.lora``
and ``peft.utils`` export, and the plain attributes of their layers (``lora_A``, ``scaling``, ``lora_variant``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError


def rank_and_alpha(config: LoraConfig, name: str) -> tuple[int, float]:
    """Return rank and alpha of the module ``name``, by PEFT's own reading of a configuration's patterns.

    ``get_pattern_key`` is not exported, and finding a name's pattern takes more than a comparison. Remove once it is
    exported.
    """
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    return (
        ranks.get(get_pattern_key(list(ranks), name), config.r),
        alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha),
    )


def expert_factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A [experts, rank, in] and B [experts, out, rank] of fused experts, as ``ParamWrapper`` lays them out.

    A's rows are grouped by expert; B's columns cycle through the experts. Remove when PEFT provides the factors itself.

    Args:
        a: [experts · rank, in].
        b: [out, rank · experts].
        experts: The number of experts.
    """
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def is_switched_off(layer: LoraLayer) -> bool:
    """Tell whether an adapter's layer is to compute without its adapter.

    Its property ``disable_adapters`` tells the same, but a compiled layer would check that again in every call: the
    compiler can skip only plain attributes. Remove when it can skip properties too.
    """
    return bool(layer._disable_adapters)


def is_swapped(layer: ParamWrapper) -> bool:
    """Tell whether a layer took its fused weight's layout for [.., in, out], so that A and B are for the transpose.

    Remove when there is a public attribute for it.
    """
    return bool(layer._did_swap_in_out_features)


@contextmanager
def adapter_stays() -> Iterator[None]:
    """Keep PEFT, within the context, from moving what it loads to the device of the base's weights, which is meta.

    Remove when ``load_adapter(torch_device=)`` decides where an adapter is held.
    """
    kinds: list[Any] = [LoraLayer, ParamWrapper, TrainableTokensLayer]
    before = [kind.__dict__.get("_move_adapter_to_device_of_base_layer") for kind in kinds]
    for kind in kinds:
        kind._move_adapter_to_device_of_base_layer = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        for kind, method in zip(kinds, before, strict=True):
            if method is None:
                del kind._move_adapter_to_device_of_base_layer
            else:
                kind._move_adapter_to_device_of_base_layer = method


class QuantisedExperts(ParamWrapper):
    """Adds the adapter's product to experts that a parametrization keeps in 4 bits.

    PEFT itself stacks a parametrization on bitsandbytes', but reads the weight in between; bitsandbytes' cache then
    returns the weight without the adapter, which would not train. Nor does PEFT remove its parametrization again.
    Remove when LoRA on ``target_parameters`` that bitsandbytes quantises trains, twice in a row.
    """

    @override
    def get_param(self) -> Tensor:
        """Return an empty tensor of the weight's shape, dtype and device: PEFT needs no more here."""
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
        finally:  # also when recomputation stops early, by an exception
            del chain[-1]

    @override
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: PEFT would add the product to a dequantised copy of the weight, and then drop the adapter."""
        raise ConfigurationError(
            f"{self.parameter_name} is held in 4 bits, into which an adapter cannot be merged; save the adapter, and "
            "merge it into the model's original weights with pipelite merge."
        )

    def _chain(self) -> Any:
        return self.get_base_layer().parametrizations[self.parameter_name]


class _AddProduct(nn.Module):
    """W + scale · left @ right, for each expert."""

    def __init__(self, left: Tensor, right: Tensor, scale: float) -> None:
        super().__init__()
        self.left, self.right, self.scale = left, right, scale

    def forward(self, weight: Tensor) -> Tensor:
        return torch.baddbmm(weight, self.left, self.right, alpha=self.scale)
