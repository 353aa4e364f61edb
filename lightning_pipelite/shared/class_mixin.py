"""Changes what a module does, in place, by mixing classes into its own: the one place that composes them.

The parts of a decoder layer come from four rooms that don't know each other, and which stands outside of which decides
what is computed. :class:`MixinPlace` is that order; whoever breaks it, or mixes a part in twice, is told so.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any, ClassVar

from torch import nn


class MixinPlace(IntEnum):
    """Where a mixin stands, from the module's own class outwards; what is further out is called first."""

    QUANTISATION = 1
    """Quantises weights as they are assigned: before anything computes with them."""
    COMPUTATION = 2
    """Computes what the module computes in another way: experts, LoRA layers, rotary embeddings."""
    RECORD = 3
    """Sees what the module returned: a router's choices."""
    MEMORY = 4
    """Runs a decoder layer under the policy of activation memory, and so once more in the backward pass."""
    CONTROL = 5
    """Hands the control classes to the layer, from outside of the recomputation, by when they may be others."""
    STAGE_ENTRY = 6
    """Swaps a layer's input for what was received: the Control Adapter must see that as the layer's input."""
    RNG = 7
    """Seeds what the layer draws: outside of torch's checkpoint, which brings back the generators that it found."""


class Mixin:
    """What :func:`mix_in` takes.

    Attributes:
        mixin_place: Where it stands among others.
    """

    mixin_place: ClassVar[MixinPlace]


def mix_in(module: nn.Module, mixin: type[Mixin]) -> Any:
    """Make ``module`` an instance of ``mixin`` and of the classes that it was of; return it.

    Modules of one class stay of one class, so that ``torch.compile`` can compile one for all. Its name tells its parts,
    from the inside: ``LlamaDecoderLayer[MemoryPolicy, StageEntry]``.

    Args:
        module: Changed in place.
        mixin: Has its place outside of all that have been mixed in before.

    Raises:
        TypeError: It is mixed in already, or something that belongs outside of it is.
    """
    kind, mixins = _parts(type(module))
    if isinstance(module, mixin):
        raise TypeError(f"{mixin.__name__} is mixed into this {type(module).__name__} already")
    if mixins and mixins[-1].mixin_place >= mixin.mixin_place:
        raise TypeError(f"{mixin.__name__} must be mixed in before {mixins[-1].__name__}: see MixinPlace")
    module.__class__ = _composed(kind, (*mixins, mixin))
    return module


def take_out(module: nn.Module, mixin: type[Mixin]) -> None:
    """Undo :func:`mix_in`; a module without the mixin, or whose class somebody else has changed, stays what it is."""
    module.__class__ = without(type(module), mixin)


def without(kind: type, mixin: type[Mixin]) -> Any:
    """Return the class that modules of class ``kind`` are of when ``mixin`` is taken out."""
    own, mixins = _parts(kind)
    return _composed(own, tuple(each for each in mixins if each is not mixin)) if mixin in mixins else kind


def own_class(module: Any) -> type:
    """Return the class that a module was of before anything was mixed in."""
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
