"""Frozen mixture-of-experts layers, computed by grouped products over tokens sorted by expert.

This is what transformers calls an experts implementation, for classes that follow its interface: the weights are fused,
[experts, ., .], in one of two layouts, and the activation is a method. Unlike transformers' own implementations, it
supports 4-bit weights and adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_pipelite.kernels.experts import Factors, Matrices, experts_in, experts_out
from lightning_pipelite.kernels.routing import sort_by_expert
from lightning_pipelite.models.quantization.four_bit import held_parts, in_order, kernel_parts
from lightning_pipelite.models.transformers_compat import gate_of_experts, has_experts_interface
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in

SECOND = "down_proj"


def follows_interface(module: nn.Module) -> bool:
    """Return whether ``module`` holds experts with fused weights that follow transformers' experts interface."""
    return has_experts_interface(module) and all(_dimensions(module, name) == 3 for name in weight_names(module))


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the first and the second weight of experts that follow the interface."""
    return "gate_up_proj" if experts.has_gate else "up_proj", SECOND


def group_experts(layers: Iterable[nn.Module]) -> None:
    """Make the experts of ``layers`` compute by grouped products where they are covered, see :func:`is_covered`."""
    modules = {module: None for layer in layers for module in layer.modules()}  # each once, even if layers share it
    for module in modules:
        if follows_interface(module) and is_covered(module):
            prepare(module)
            mix_in(module, _GroupedExperts)


def have_single_experts(layers: Iterable[nn.Module]) -> bool:
    """Return whether any of ``layers`` loops over its experts: in a list, or fused outside of the interface."""
    modules = [module for layer in layers for module in layer.modules()]
    others = [module for module in modules if not follows_interface(module)]
    fused = any(p.ndim > 2 for module in others for p in module.parameters(recurse=False))
    return fused or any(isinstance(module, nn.ModuleList) for module in modules)


def is_covered(experts: nn.Module) -> bool:
    """Return whether experts that follow the interface are frozen, in full precision or in nf4."""
    frozen = not any(parameter.requires_grad for parameter in experts.parameters())
    return frozen and all(_is_whole(experts, name) or _in_nf4(experts, name) for name in weight_names(experts))


def prepare(experts: Any) -> None:
    """Prepare covered experts for :func:`compute`."""
    share_class(experts)
    for name in weight_names(experts):
        if not _is_whole(experts, name):
            chain = experts.parametrizations[name]
            parts, state = _in_nf4(experts, name), chain[0].quant_state
            assert parts is not None
            chain[0].__dict__.update(_held=held_parts(parts), _shape=tuple(state.shape))


def compute(
    experts: Any, hidden_states: Tensor, chosen: Tensor, scores: Tensor, factors: Mapping[str, Factors]
) -> Tensor:
    """Return the weighted sum of the experts' outputs for each token: [tokens, hidden].

    Args:
        experts: Covered experts that :func:`prepare` has prepared.
        hidden_states: [tokens, hidden].
        chosen: Int [tokens, copies], the experts of each token.
        scores: [tokens, copies], the weights in that sum.
        factors: The adapters, by the name of the weight that each adapts.
    """
    first, second = weight_names(experts)
    groups = sort_by_expert(chosen, experts.num_experts)
    inner = experts_in(hidden_states, groups, _matrices(experts, first), factors.get(first))
    inner = gate_of_experts(experts, inner)
    return experts_out(inner, scores, chosen, groups, _matrices(experts, second), factors.get(second))


class _GroupedExperts(Mixin):
    """Mixed into experts. Overrides ``__call__`` to skip the hooks of bitsandbytes, which are not needed here."""

    mixin_place = MixinPlace.COMPUTATION

    def __call__(self, hidden_states: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        # PEFT's own forward adds B·A to the weight by a parametrization, which may be the only one.
        if any(len(chain) > 1 or not hasattr(chain[0], "_held") for chain in self._chains()):
            return super().__call__(hidden_states, chosen, scores)  # type: ignore[misc]
        return compute(self, hidden_states, chosen, scores, {})

    def _chains(self) -> list[Any]:
        names: Any = weight_names(self)  # type: ignore[arg-type]
        return [self.parametrizations[name] for name in names if is_parametrized(self, name)]  # type: ignore[arg-type, attr-defined]


_shared: dict[Any, type[nn.Module]] = {}


def share_class(module: nn.Module) -> None:
    """Give parametrised modules of one original class a common class again, so that they share a compiled graph.

    torch creates a class for each module, whose properties hold a reference to it. Sharing that class with other
    modules, also of later models, would keep the first module's weights alive, so the properties are replaced.
    """
    kind = type(module)
    if is_parametrized(module) and kind.__base__ is not None:
        names = sorted(dict(module.parametrizations.items()))  # type: ignore[operator, union-attr]
        key = (kind.__base__, *names)
        if key not in _shared:
            members = vars(kind) | {name: _parametrised(name) for name in names}
            members = {name: members[name] for name in members.keys() - {"__dict__", "__weakref__"}}
            _shared[key] = type(kind.__name__, kind.__bases__, members)
        module.__class__ = _shared[key]


def _parametrised(name: str) -> property:
    return property(lambda module: module.parametrizations[name]())


def _dimensions(module: Any, name: str) -> int:
    if is_parametrized(module, name):
        return len(module.parametrizations[name][0].quant_state.shape)
    return getattr(getattr(module, name, None), "ndim", 0)


def _is_whole(experts: Any, name: str) -> bool:
    return not is_parametrized(experts, name) and getattr(experts, name).is_floating_point()


def _in_nf4(experts: Any, name: str) -> list[Tensor] | None:
    """Return the weight's parts in nf4, see :mod:`~lightning_pipelite.kernels.frozen_weight`; None if not in nf4."""
    if not is_parametrized(experts, name):
        return None
    (*others, last) = experts.parametrizations[name]
    return None if others else kernel_parts(experts.parametrizations[name].original, getattr(last, "quant_state", None))


def _matrices(experts: Any, name: str) -> Matrices:
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if is_parametrized(experts, name):
        held = experts.parametrizations[name][0]
        return Matrices(in_order(held._held), held._shape, experts.is_transposed, bias)
    weight = getattr(experts, name)
    return Matrices([weight], tuple(weight.shape), experts.is_transposed, bias)
