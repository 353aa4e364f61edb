"""Frozen experts of a mixture, computed by grouped products over tokens that are sorted by expert.

What transformers calls an experts implementation, for the classes that follow its interface: their weights are fused,
[experts, ., .], in one of two layouts, and their activation is a method. It knows 4-bit weights and adapters, which
transformers' own do not.
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
    """Tell whether ``module`` holds experts that transformers computes in several ways, in fused weights."""
    return has_experts_interface(module) and all(_dimensions(module, name) == 3 for name in weight_names(module))


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the first and of the second weights of experts that follow the interface."""
    return "gate_up_proj" if experts.has_gate else "up_proj", SECOND


def group_experts(layers: Iterable[nn.Module]) -> None:
    """Let the experts of ``layers`` compute by grouped products where they are frozen and covered."""
    modules = {module: None for layer in layers for module in layer.modules()}  # once, where layers share one
    for module in modules:
        if follows_interface(module) and is_covered(module):
            prepare(module)
            mix_in(module, _GroupedExperts)


def have_single_experts(layers: Iterable[nn.Module]) -> bool:
    """Tell whether one of ``layers`` goes through its experts one by one: in a list, or fused in a way of its own."""
    modules = [module for layer in layers for module in layer.modules()]
    others = [module for module in modules if not follows_interface(module)]
    fused = any(p.ndim > 2 for module in others for p in module.parameters(recurse=False))
    return fused or any(isinstance(module, nn.ModuleList) for module in modules)


def is_covered(experts: nn.Module) -> bool:
    """Tell whether experts that follow the interface are frozen, in full precision or in nf4."""
    frozen = not any(parameter.requires_grad for parameter in experts.parameters())
    return frozen and all(_is_whole(experts, name) or _in_nf4(experts, name) for name in weight_names(experts))


def prepare(experts: Any) -> None:
    """Get covered experts ready for :func:`compute`."""
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
    """Return what the experts make of each token, weighted and added up: [tokens, hidden].

    Args:
        experts: Covered ones.
        hidden_states: [tokens, hidden].
        chosen: Int [tokens, copies], the experts of each token.
        scores: [tokens, copies].
        factors: The adapters, by the name of the weight that each adapts.
    """
    first, second = weight_names(experts)
    groups = sort_by_expert(chosen, experts.num_experts)
    inner = experts_in(hidden_states, groups, _matrices(experts, first), factors.get(first))
    inner = gate_of_experts(experts, inner)
    return experts_out(inner, scores, chosen, groups, _matrices(experts, second), factors.get(second))


class _GroupedExperts(Mixin):
    """Mixed into experts. In ``__call__``: what bitsandbytes hooks to the module is not needed here."""

    mixin_place = MixinPlace.COMPUTATION

    def __call__(self, hidden_states: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        # PEFT's own forward adds its product to the weight, by a parametrization that may be the only one.
        if any(len(chain) > 1 or not hasattr(chain[0], "_held") for chain in self._chains()):
            return super().__call__(hidden_states, chosen, scores)  # type: ignore[misc]
        return compute(self, hidden_states, chosen, scores, {})

    def _chains(self) -> list[Any]:
        names: Any = weight_names(self)  # type: ignore[arg-type]
        return [self.parametrizations[name] for name in names if is_parametrized(self, name)]  # type: ignore[arg-type, attr-defined]


_shared: dict[Any, type[nn.Module]] = {}


def share_class(module: nn.Module) -> None:
    """Give parametrised modules of one class one class again, so that one compiled graph serves them all.

    torch makes a class for each, all alike, with properties that hold the module: one that is kept for others, of
    later models too, would keep the first one's weights. So the properties are made anew.
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
    """Return the weight's parts in nf4 (see :mod:`~lightning_pipelite.kernels.frozen_weight`), None if it has none."""
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
