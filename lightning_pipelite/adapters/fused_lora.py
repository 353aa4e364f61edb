"""LoRA layers of PEFT that compute with their frozen weight in one operation, and with what shares their input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_pipelite.kernels.lora import lora_linear
from lightning_pipelite.models.quantization import four_bit, fp8
from lightning_pipelite.models.quantization.fp8 import Fp8Linear
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in

_SMALL = 2**24
"""Weights whose products with 4096 tokens take an H200 0.2 ms; the host takes 0.02 to 0.04 for each that it begins."""


def fuse(layers: dict[str, nn.Module], adapter: str, shared_inputs: Iterable[list[str]]) -> None:
    """Let PEFT's LoRA layers compute by :func:`~lightning_pipelite.kernels.lora.lora_linear` where it covers them.

    PEFT's own forward remains for its variants (DoRA, a bias of B), for base layers that are trained or in other
    formats, and for adapters that are merged or switched off.

    Weights in FP8 that share their input, and small ones in nf4, are held one behind the other from now on, and
    computed with as one.

    Args:
        layers: PEFT's layers by their names in the model.
        adapter: The adapter's name in them.
        shared_inputs: Names of linear layers that are called one after the other with one and the same tensor.
    """
    fused = {name: layer for name, layer in layers.items() if _covered(layer, adapter)}
    in_fp8 = {name: _in_fp8(layer) for name, layer in fused.items()}
    alike = ([n for n in names if in_fp8.get(n) is kind] for names in shared_inputs for kind in (False, True))
    for names in (*alike, *([name] for name in layers)):
        members = [fused.pop(name) for name in names if name in fused]
        for number, layer in enumerate(members):
            mix_in(layer, _FusedLoRA)
            layer._adapter, layer._number, layer._ready = adapter, number, None  # type: ignore[assignment]
            layer._group, layer._joined = members, None  # type: ignore[assignment]
        if len(members) > 1:
            members[0]._joined = _join(members)  # type: ignore[assignment]


def _covered(layer: Any, adapter: str) -> bool:
    base = layer.get_base_layer()
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    plain = adapter not in layer.lora_variant and layer.lora_B[adapter].bias is None
    return frozen and plain and _parts(base) is not None


def _in_fp8(layer: Any) -> bool:
    base = layer.get_base_layer()
    return isinstance(base, Fp8Linear) and base.in_fp8


class _FusedLoRA(Mixin):
    """Mixed into PEFT's layer. The first layer of a group computes for all; the others take what is theirs."""

    mixin_place = MixinPlace.COMPUTATION
    _adapter: str
    _number: int
    _group: list[Any]
    _joined: list[Tensor] | None  # of the first: the parts in nf4 of all weights as of one
    _ready: tuple[Tensor, list[Tensor]] | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged:  # type: ignore[attr-defined]
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        members = self._group
        if self._number == 0:
            outputs = _compute(members, x, self._adapter)
            self._ready = (x, outputs) if len(members) > 1 else None
            return outputs[0]
        ready = members[0]._ready
        if ready is None or ready[0] is not x:  # called by itself
            return _compute([self], x, self._adapter)[0]
        if self._number == len(members) - 1:
            members[0]._ready = None
        return ready[1][self._number]


def _compute(members: list[Any], x: Tensor, adapter: str) -> list[Tensor]:
    bases = [layer.get_base_layer() for layer in members]
    a = [layer.lora_A[adapter].weight for layer in members]
    b = [layer.lora_B[adapter].weight for layer in members]
    biases = [None if base.bias is None else base.bias.to(x.dtype) for base in bases]
    scales = [layer.scaling[adapter] for layer in members]
    projected = []
    for layer, down in zip(members, a, strict=True):
        dropout = layer.lora_dropout[adapter]
        if layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            projected.append(linear(dropout(x), down.to(x.dtype)))
    in_fp8 = _in_fp8(members[0]) and x.dtype == torch.bfloat16  # one as all
    joined = None
    if len(members) > 1 and all(scale == scales[0] for scale in scales):
        joined = bases[0].joined if in_fp8 else members[0]._joined
    # Not all the others as well: the compiler would look at each in every call.
    weights = [joined] if joined is not None else [cast(list[Tensor], _parts(base)) for base in bases]
    return lora_linear(x, weights, a, b, biases, scales, projected or None, in_fp8=in_fp8)


def _join(members: list[Any]) -> list[Tensor] | None:
    """Hold weights one behind the other if that is of use; return the parts of all as of one, if they are in nf4."""
    bases = [layer.get_base_layer() for layer in members]
    if _in_fp8(members[0]):
        fp8.join(bases)
        return None
    # A GPU is done with all these weights sooner than the host has begun their products one by one.
    small = sum(base.out_features * base.in_features for base in bases) <= _SMALL
    return four_bit.join([base.weight for base in bases]) if small else None


def _parts(base: Any) -> list[Tensor] | None:
    """Return the weight as the kernel takes it; None if it knows no such layer."""
    if isinstance(base, Fp8Linear):
        return base.parts
    if type(base) is nn.Linear and base.weight.is_floating_point():
        return [base.weight]
    return four_bit.kernel_parts(base.weight, getattr(base.weight, "quant_state", None))
