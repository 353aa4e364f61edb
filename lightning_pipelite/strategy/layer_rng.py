"""Random numbers: the same on every rank for the data, and independent of the partition for each layer."""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in, take_out, without
from lightning_pipelite.strategy.layers import Chain
from lightning_pipelite.strategy.pieces import Pieces

_KEY = "_pipelite_rng"


class LayerRNG:
    """Seeds torch's generators for each layer, so that what it draws does not depend on the partition.

    The first stage takes the inputs of a micro-batch and the last stage the targets, each from its own data loader. So
    shuffling and augmentation must draw the same numbers on all ranks, whatever the layers draw in between. What a
    layer draws, such as a dropout mask, depends only on the seed, the step, the number of the micro-batch in the global
    batch and the layer's name: it is the same for any number of stages and replicas, and resuming needs no generator
    state for it. A layer is an item of a list of modules (ModuleList, Sequential), or a dropout module outside such
    lists. :meth:`release` restores the layers.

    Constructing it copies rank 0's global generators (torch's, NumPy's, Python's) to all ranks. Collective.

    Args:
        strategy: Broadcasts rank 0's generators.
        device: The device of the layers.
        stage: This rank's stage.
    """

    def __init__(self, strategy: Strategy, device: torch.device, stage: nn.Module) -> None:
        _set_rng_states(strategy.broadcast(_collect_rng_states(include_cuda=False)))
        self._on_gpu = device if device.type == "cuda" else None
        self._generators: list[torch.Generator] = [torch.default_generator]
        if self._on_gpu:
            torch.cuda.manual_seed(torch.initial_seed())
            index = device.index if device.index is not None else torch.cuda.current_device()
            self._generators.append(torch.cuda.default_generators[index])
        self._seed = torch.initial_seed()
        self._place = (0, 0)
        self._drawing = list(_layers(stage))
        for name, layer in self._drawing:
            layer.__dict__[_KEY] = (self, name)
            if not isinstance(layer, _OwnRNG):  # a layer in two lists already is
                mix_in(layer, _OwnRNG)

    @contextlib.contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Let the layers draw inside the context; on exit, restore the global generators."""
        shared = [generator.get_state() for generator in self._generators]
        try:
            yield
        finally:
            for generator, state in zip(self._generators, shared, strict=True):
                generator.set_state(state)

    def enter(self, step: int, micro_batch: int) -> None:
        """Seed the generators for a micro-batch.

        Args:
            step: The number of steps taken before.
            micro_batch: Its number in the global batch of the step.
        """
        self._place = (step, micro_batch)
        self.draw_for("")

    def draw_for(self, layer: str) -> None:
        """Seed the generators for a layer of the current micro-batch."""
        key = f"{self._seed}/{self._place[0]}/{self._place[1]}/{layer}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
        for generator in self._generators:
            generator.manual_seed(seed)

    def release(self) -> None:
        """Restore the layers: they draw from the global generators again."""
        for _, layer in self._drawing:
            layer.__dict__.pop(_KEY, None)
            take_out(layer, _OwnRNG)
        self._drawing = []

    # For checkpoints

    def state(self) -> dict[str, Any]:
        """Return the seed of the layers and the states of the global generators."""
        state = {"layers": self._seed, "global": _collect_rng_states(include_cuda=False)}
        if self._on_gpu:
            state["gpu"] = self._generators[1].get_state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned, on any device."""
        self._seed = state["layers"]
        _set_rng_states(state["global"])
        gpu: Tensor | None = state.get("gpu")
        if self._on_gpu and gpu is not None:
            self._generators[1].set_state(gpu)


class _OwnRNG(Mixin):
    """Mixed into a layer to seed the generators before it runs.

    This is not a forward pre-hook: with activation checkpointing, a layer's hooks run again in the backward pass, when
    another micro-batch has been entered. This runs outside torch's checkpoint, which restores the generators itself.
    """

    mixin_place = MixinPlace.RNG

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (drawn := self.__dict__.get(_KEY)) is not None:
            layer_rng, name = drawn
            layer_rng.draw_for(name)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce the layer without this class, so that copies and pickles are independent of this run."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make = _new  # pickle allows __newobj__ only for the object's own class
        kind = without(type(self), _OwnRNG)
        arguments = tuple(kind if argument is type(self) else argument for argument in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key != _KEY}
        return make, arguments, *rest


def _new(kind: Any, *arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Pieces):
        found = [pair for piece in module for pair in _layers(piece, prefix)]
        yield from {id(layer): (name, layer) for name, layer in found}.values()  # a layer may be in several pieces
        return
    for name, child in module.named_children():
        full_name = f"{prefix}{name}"
        if isinstance(module, (nn.ModuleList, nn.Sequential, Chain)) or isinstance(child, _DropoutNd):
            yield full_name, child
        else:
            yield from _layers(child, f"{full_name}.")
