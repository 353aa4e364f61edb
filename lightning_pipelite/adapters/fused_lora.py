"""PEFT's LoRA layers fused into one operation with their frozen weights, and with layers that share their input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_pipelite.adapters.peft_compat import is_switched_off
from lightning_pipelite.kernels.lora import lora_linear
from lightning_pipelite.models.quantization import four_bit, fp8
from lightning_pipelite.models.quantization.fp8 import Fp8Linear
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in

_SMALL = 2**24
"""Number of weights whose products with 4096 tokens take an H200 0.2 ms; the host takes 0.02 to 0.04 to launch each."""


def fuse(layers: dict[str, nn.Module], adapter: str, shared_inputs: Iterable[list[str]]) -> None:
    """Make PEFT's LoRA layers compute by :func:`~lightning_pipelite.kernels.lora.lora_linear` where it covers them.

    PEFT's own forward remains in use for its variants (DoRA, a bias of B), for base layers that are trained or in other
    formats, and for adapters that are merged or disabled.

    FP8 weights that share their input, and small ones in nf4, are moved into contiguous memory and multiplied as one.

    Args:
        layers: PEFT's layers by their names in the model.
        adapter: The adapter's name in them.
        shared_inputs: Groups of linear layers, by name, that are called in succession with the same tensor.
    """
    fused: dict[str, Any] = {name: layer for name, layer in layers.items() if _covered(layer, adapter)}
    in_fp8 = {name: _in_fp8(layer) for name, layer in fused.items()}
    alike = ([n for n in names if in_fp8.get(n) is kind] for names in shared_inputs for kind in (False, True))
    for names in (*alike, *([name] for name in layers)):
        members = [fused.pop(name) for name in names if name in fused]
        joined = _join(members) if len(members) > 1 else None
        for number, layer in enumerate(members):
            mix_in(layer, _FusedLoRA)
            layer.__dict__.update(
                _adapter=adapter, _number=number, _group=dict(enumerate(members)), _ready=None, _joined=joined,
                _in_nf4=_nf4_parts(layer.get_base_layer()), _is_merged=layer.merged,
            )  # fmt: skip


def _covered(layer: Any, adapter: str) -> bool:
    base = layer.get_base_layer()
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    plain = adapter not in layer.lora_variant and layer.lora_B[adapter].bias is None
    known = isinstance(base, Fp8Linear) or _is_whole(base) or _nf4_parts(base) is not None
    return frozen and plain and known


def _in_fp8(layer: Any) -> bool:
    base = layer.get_base_layer()
    return isinstance(base, Fp8Linear) and base.in_fp8


def _is_whole(base: Any) -> bool:
    return type(base) is nn.Linear and base.weight.is_floating_point()


def _nf4_parts(base: Any) -> dict[int, nn.Parameter] | None:
    if isinstance(base, Fp8Linear) or _is_whole(base):
        return None
    parts = four_bit.kernel_parts(base.weight, getattr(base.weight, "quant_state", None))
    return None if parts is None else four_bit.held_parts(parts)


def _join(members: list[Any]) -> dict[int, nn.Parameter] | None:
    """Make weights contiguous in memory if that helps; return the parts of all as those of one, if they are in nf4."""
    bases = [layer.get_base_layer() for layer in members]
    if _in_fp8(members[0]):
        fp8.join(bases)
    if any(isinstance(base, Fp8Linear) or _is_whole(base) for base in bases):
        return None
    # A GPU finishes the products of weights this small sooner than the host launches them one by one.
    small = sum(base.out_features * base.in_features for base in bases) <= _SMALL
    parts = four_bit.join([base.weight for base in bases]) if small else None
    return None if parts is None else four_bit.held_parts(parts)


class _FusedLoRA(Mixin):
    """Mixed into PEFT's layer. The first layer of a group computes for all; the others take their outputs from it.

    What a compiled layer calls here reads only plain attributes, dictionaries and modules: the compiler's guards on
    these cost next to nothing (from Python 3.12 on), whereas each list and property is checked again in every call.
    """

    mixin_place = MixinPlace.COMPUTATION
    _adapter: str
    _number: int
    _group: dict[int, Any]
    _ready: tuple[Tensor, list[Tensor]] | None
    _joined: dict[int, nn.Parameter] | None  # nf4 parts of all weights of the group, as of one weight
    _in_nf4: dict[int, nn.Parameter] | None  # those of this layer's weight
    _is_merged: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self._is_merged or is_switched_off(self):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        group, count = self._group, len(self._group)
        if self._number == 0:
            outputs = _compute([group[number] for number in range(count)], x, self._adapter)
            self._ready = (x, outputs) if count > 1 else None
            return outputs[0]
        ready = group[0]._ready
        if ready is None or ready[0] is not x:  # called on its own
            return _compute([self], x, self._adapter)[0]
        if self._number == count - 1:
            group[0]._ready = None
        return ready[1][self._number]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().merge(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._look_again()

    def unmerge(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().unmerge(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._look_again()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the layer as ``nn.Module`` does, then update what is known of the weight."""
        applied = super()._apply(*args, **kwargs)  # type: ignore[misc]
        self._look_again()
        return applied

    def _look_again(self) -> None:
        """Update what is known of the weight; if it has moved in memory, it is no longer joined with the others."""
        self._is_merged = self.merged  # type: ignore[attr-defined]
        base: Any = self.get_base_layer()  # type: ignore[attr-defined]
        if self._in_nf4 is not None and self._in_nf4[0].data_ptr() != base.weight.data_ptr():
            self._in_nf4 = _nf4_parts(base)
            self._group[0]._joined = None


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
    in_fp8 = _in_fp8(members[0]) and x.dtype == torch.bfloat16  # the same for all members
    alike = len(members) > 1 and all(scale == scales[0] for scale in scales)
    # The first layer has the joined weight; the compiler would guard on each of the others in every call.
    if alike and in_fp8:
        weights = [bases[0].joined()]
    elif alike and members[0]._joined is not None:
        weights = [four_bit.in_order(members[0]._joined)]
    else:
        weights = [_parts(layer, base) for layer, base in zip(members, bases, strict=True)]
    return lora_linear(x, weights, a, b, biases, scales, projected or None, in_fp8=in_fp8)


def _parts(layer: Any, base: Any) -> list[Tensor]:
    """Return the layer's weight in the form that the kernel takes."""
    if layer._in_nf4 is not None:
        return four_bit.in_order(layer._in_nf4)
    return base.parts() if isinstance(base, Fp8Linear) else [base.weight]
