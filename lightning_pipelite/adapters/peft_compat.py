"""Every part of PEFT that it does not document: what it is for, and what to watch for its removal.

Tested with PEFT 0.21.0 to 0.21.2; pyproject.toml allows more, of which ``tests/adapters/test_peft_compat.py`` names
what is gone. Other files use what ``peft``, ``peft.tuners.lora`` and ``peft.utils`` export, and the plain attributes of
their layers (``lora_A``, ``scaling``, ``lora_variant``).
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

    ``get_pattern_key`` is not exported, and which pattern is a name's is more than a comparison. Remove when it is.
    """
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    return (
        ranks.get(get_pattern_key(list(ranks), name), config.r),
        alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha),
    )


def expert_factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A [experts, rank, in] and B [experts, out, rank] of fused experts, as ``ParamWrapper`` lays them out.

    A's rows are those of one expert after the other, B's columns go round. Remove when it hands them out itself.

    Args:
        a: [experts · rank, in].
        b: [out, rank · experts].
        experts: How many.
    """
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def is_switched_off(layer: LoraLayer) -> bool:
    """Tell whether an adapter's layer is to compute without its adapter.

    As its property ``disable_adapters`` does, which a compiled layer would look at anew in every call: the compiler
    looks away only from plain attributes. Remove when it does so from properties too.
    """
    return bool(layer._disable_adapters)


def is_swapped(layer: ParamWrapper) -> bool:
    """Tell whether a layer around a fused weight took [.., in, out] for its layout, and A and B are of the transpose.

    Remove when there is a public attribute for it.
    """
    return bool(layer._did_swap_in_out_features)


@contextmanager
def adapter_stays() -> Iterator[None]:
    """Keep PEFT, within the context, from moving what it reads to the device of the base's weights, which is meta.

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

    PEFT's own way stacks a parametrization on the one of bitsandbytes, but asks for the weight in between, which
    bitsandbytes' cache then hands out without the adapter: it would not train. Nor is it taken off again. Remove when
    LoRA on ``target_parameters`` that bitsandbytes quantises trains, twice in a row.
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

    @override
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: PEFT would add the product to a weight that is made whole for that, and then forget the adapter."""
        raise ConfigurationError(
            f"{self.parameter_name} is held in 4 bits, into which no adapter is merged; save the adapter, and merge it "
            "into the model's own weights with pipelite merge."
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
