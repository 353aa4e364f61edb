"""LoRA layers of PEFT that compute with their frozen weight in one operation, and with what shares their input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_pipelite.kernels.lora import BLOCK, lora_linear
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in


def fuse(layers: dict[str, nn.Module], adapter: str, shared_inputs: Iterable[list[str]]) -> None:
    """Let PEFT's LoRA layers compute by :func:`~lightning_pipelite.kernels.lora.lora_linear` where it covers them.

    PEFT's own forward remains for its variants (DoRA, a bias of B), for base layers that are trained or in other
    formats, and for adapters that are merged or switched off.

    Args:
        layers: PEFT's layers by their names in the model.
        adapter: the adapter's name in them.
        shared_inputs: names of linear layers that are called one after the other with one and the same tensor.
    """
    fused = {name: layer for name, layer in layers.items() if _covered(layer, adapter)}
    for names in (*shared_inputs, *([name] for name in layers)):
        members = [fused.pop(name) for name in names if name in fused]
        for number, layer in enumerate(members):
            mix_in(layer, _FusedLoRA)
            layer._adapter, layer._number, layer._ready = adapter, number, None  # type: ignore[assignment]
            layer._group = members  # type: ignore[assignment]


def _covered(layer: Any, adapter: str) -> bool:
    base = layer.get_base_layer()
    state = getattr(base.weight, "quant_state", None)
    plain = type(base) is nn.Linear and base.weight.is_floating_point()
    four_bit = state is not None and state.quant_type == "nf4" and state.blocksize == BLOCK
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return (plain or four_bit) and frozen and adapter not in layer.lora_variant and layer.lora_B[adapter].bias is None


class _FusedLoRA(Mixin):
    """Mixed into PEFT's layer. The first layer of a group computes for all; the others take what is theirs."""

    mixin_place = MixinPlace.COMPUTATION
    _adapter: str
    _number: int
    _group: list[Any]
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
    weights, a, b, biases, scales, projected = [], [], [], [], [], []
    for layer in members:
        base = layer.get_base_layer()
        weights.append(_parts(base.weight))
        biases.append(None if base.bias is None else base.bias.to(x.dtype))
        a.append(layer.lora_A[adapter].weight)
        b.append(layer.lora_B[adapter].weight)
        scales.append(layer.scaling[adapter])
        dropout = layer.lora_dropout[adapter]
        if layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            projected.append(linear(dropout(x), a[-1].to(x.dtype)))
    return lora_linear(x, weights, a, b, biases, scales, projected or None)


def _parts(weight: Any) -> list[Tensor]:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight]
    parts = [weight, state.absmax]
    return [*parts, state.state2.absmax, state.state2.code, state.offset] if state.nested else parts
