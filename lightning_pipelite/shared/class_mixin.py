"""Changes what a module does, in place, by mixing classes into its own: the only place that composes them.

The parts of a decoder layer come from several subpackages that don't know each other, and the order in which they are
nested decides what is computed. :class:`MixinPlace` is that order; breaking it, or mixing a part in twice, raises.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any, ClassVar

from torch import nn


class MixinPlace(IntEnum):
    """The places of mixins, from the module's own class outwards; outer ones are called first."""

    QUANTISATION = 1
    """Quantises weights as they are assigned: before anything computes with them."""
    COMPUTATION = 2
    """Replaces the module's computation by another: experts, LoRA layers, rotary embeddings."""
    RECORD = 3
    """Records what the module returned: a router's choices."""
    MEMORY = 4
    """Runs a decoder layer under the activation-memory policy, which may run it again in the backward pass."""
    CONTROL = 5
    """Passes the control classes to the layer from outside the recomputation, by which time they may have changed."""
    STAGE_ENTRY = 6
    """Swaps a layer's input for what was received: the Control Adapter must see that as the layer's input."""
    RNG = 7
    """Seeds what the layer draws: outside torch's checkpoint, which restores the RNG state that it found."""


class Mixin:
    """Base class of what :func:`mix_in` takes.

    Attributes:
        mixin_place: Its place among other mixins.
    """

    mixin_place: ClassVar[MixinPlace]


def mix_in(module: nn.Module, mixin: type[Mixin]) -> Any:
    """Make ``module`` an instance of ``mixin`` as well as of its current classes; return it.

    Modules that share a class still do afterwards, so that ``torch.compile`` can compile one for all. The name of the
    class lists its parts from the inside out: ``LlamaDecoderLayer[MemoryPolicy, StageEntry]``.

    Args:
        module: Changed in place.
        mixin: Its place must be outside of all that have been mixed in before.

    Raises:
        TypeError: It is already mixed in, or so is something in the same place or outside of it.
    """
    kind, mixins = _parts(type(module))
    if isinstance(module, mixin):
        raise TypeError(f"{mixin.__name__} is already mixed into this {type(module).__name__}")
    if mixins and mixins[-1].mixin_place >= mixin.mixin_place:
        raise TypeError(f"{mixin.__name__} must be mixed in before {mixins[-1].__name__}: see MixinPlace")
    module.__class__ = _composed(kind, (*mixins, mixin))
    return module


def take_out(module: nn.Module, mixin: type[Mixin]) -> None:
    """Undo :func:`mix_in`; a module without the mixin, or whose class other code has changed, is left as it is."""
    module.__class__ = without(type(module), mixin)


def without(kind: type, mixin: type[Mixin]) -> Any:
    """Return the class that modules of class ``kind`` have once ``mixin`` is taken out."""
    own, mixins = _parts(kind)
    return _composed(own, tuple(each for each in mixins if each is not mixin)) if mixin in mixins else kind


def own_class(module: Any) -> type:
    """Return the class that a module had before anything was mixed in."""
    return _parts(type(module))[0]


def _parts(kind: type) -> tuple[type, tuple[type[Mixin], ...]]:
    parts: tuple[type, tuple[type[Mixin], ...]] = vars(kind).get("_composed_of", (kind, ()))
    return parts


@cache
def _composed(kind: type, mixins: tuple[type[Mixin], ...]) -> Any:
    if not mixins:
        return kind
    names = ", ".join(mixin.__name__.lstrip("_") for mixin in mixins)
    members = {"__module__": kind.__module__, "_composed_of": (kind, mixins)}
    return type(f"{kind.__name__}[{names}]", (*reversed(mixins), kind), members)
