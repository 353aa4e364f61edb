"""What a LightningModule hands to the strategy: its layers, and the loss on what the last one returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_pipelite.errors import ConfigurationError

Loss = Callable[[Any, Any], "Tensor | tuple[Tensor, ...]"]
"""``loss(outputs, targets)`` of one micro-batch.

It returns either a scalar, the mean over the micro-batch (every micro-batch then weighs the same), or a pair
``(total, count)``: the sum of the losses and the number of terms in it (tokens, say). With the pair, what is trained
on is exactly the sum of all totals over the sum of all counts in the global batch.

A loss with an attribute ``logged``, a tuple of names, returns after the pair one more scalar for each name; the
strategy logs ``train/NAME``, the sum of these over the sum of all counts.
"""


@dataclass(frozen=True)
class LayerCosts:
    """What each layer costs, so that stages can be balanced.

    Embedding and the like count in the first layer, head and loss in the last.

    Attributes:
        seconds: the time of a micro-batch, forward and backward; in any unit.
        held: bytes that a layer takes at all times: weights, gradients, optimizer state.
        retained: bytes that a layer keeps of each micro-batch in flight for its backward pass.
        micro_batches: of a step.
        memory: bytes of a device for all of a stage's layers; None for no limit.
    """

    seconds: Sequence[float]
    held: Sequence[int]
    retained: Sequence[int]
    micro_batches: int
    memory: int | None = None


@runtime_checkable
class PipelineLayers(Protocol):
    """Layers that are built a stage at a time, so that no process ever holds those of another stage."""

    names: Sequence[str]
    """The class name of each layer, in order; ``partition_method="type:REGEX"`` looks at these."""

    def parameter_counts(self) -> Sequence[int]:
        """The number of parameters of each layer, frozen ones too."""
        ...

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        """Build layers ``start`` to ``stop`` (exclusive) on ``device``, as one module from inputs to outputs.

        Its parameter names must not depend on the partition. A parameter that stands under one name in several
        stages is tied: its gradients are summed over them.
        """
        ...

    # Layers may have a method ``layer_costs() -> LayerCosts`` as well, for partition_method="auto".


class SequentialLayers:
    """A plain list of modules as pipeline layers: each maps the former's output to its own.

    Args:
        layers: the modules, in order. One module may stand in several places, and several may share a parameter; both
            ties it.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        for index, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise ConfigurationError(
                    f"pipeline_layers() must return torch.nn.Modules, but item {index} is a {type(layer).__name__}."
                )
        self._layers = list(layers)
        owners: dict[int, set[int]] = {}
        parameters = {id(p): p for layer in layers for p in layer.parameters()}
        for layer in layers:
            for parameter in layer.parameters():
                owners.setdefault(id(parameter), set()).add(id(layer))
        # Under the name of its first layer, a stage without that layer would not know it for the same parameter.
        self._shared = {f"shared_{i}": parameters[p] for i, p in enumerate(p for p in owners if len(owners[p]) > 1)}
        self.names = [type(layer).__name__ for layer in layers]

    def parameter_counts(self) -> list[int]:
        return [sum(p.numel() for p in layer.parameters()) for layer in self._layers]

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        # The first position of a layer names it, in whichever stage it stands.
        first = {id(layer): index for index, layer in reversed(list(enumerate(self._layers)))}
        mine = self._layers[start:stop]
        kept = {id(module) for layer in mine for module in layer.modules()}
        for module in (module for layer in self._layers for module in layer.modules()):
            if id(module) not in kept:
                module._apply(lambda tensor: tensor.to("meta"), recurse=False)
        for layer in mine:
            layer.to(device)
        here = {id(p) for layer in mine for p in layer.parameters()}
        shared = {name: p for name, p in self._shared.items() if id(p) in here}
        return Chain([(str(first[id(layer)]), layer) for layer in mine], shared)


class Chain(nn.Module):
    """Modules in a row, registered under given names; one that stands in several places is registered once."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], shared: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in shared.items():  # before the layers, so that this is its name
            self.register_parameter(name, parameter)
        for name, layer in layers:
            self.add_module(name, layer)
        self._order = [name for name, _ in layers]

    def forward(self, inputs: Any) -> Any:
        for name in self._order:
            inputs = self._modules[name](inputs)  # type: ignore[misc]
        return inputs


def hand_out_layers(module: Any) -> tuple[PipelineLayers, Loss]:
    """Ask a LightningModule for its layers and its loss.

    Args:
        module: a LightningModule with a method ``pipeline_layers()`` that returns ``(layers, loss)``: a list of
            modules or a :class:`PipelineLayers`, and a :data:`Loss`.

    Raises:
        ConfigurationError: if there is no such method, or it returns something else.
    """
    if not callable(getattr(module, "pipeline_layers", None)):
        raise ConfigurationError(
            f"{type(module).__name__} has no method pipeline_layers(); "
            "PipeLiteStrategy needs one that returns (layers, loss)."
        )
    handed = module.pipeline_layers()
    if not isinstance(handed, tuple) or len(handed) != 2 or not callable(handed[1]):
        raise ConfigurationError(f"{type(module).__name__}.pipeline_layers() must return a pair (layers, loss).")
    layers, loss = handed
    if not isinstance(layers, PipelineLayers):
        layers = SequentialLayers(layers)
    return layers, loss


def is_built(module: Any) -> bool:
    """Whether a LightningModule has its stage already, from an earlier run, which :func:`build_stage` will return."""
    return getattr(module, "_pipelite_stage", None) is not None


def build_stage(
    module: Any, layers: PipelineLayers, bounds: Sequence[int], stage_id: int, device: torch.device
) -> nn.Module:
    """Build a stage, or return that of the module's run before, with what it has learnt.

    Args:
        module: the LightningModule, of which the stage becomes a submodule.
        layers: its layers.
        bounds: of all stages, see :func:`~lightning_pipelite.strategy.partition.partition`.
        stage_id: which one.
        device: where it is built.

    Raises:
        ConfigurationError: if the module was cut in another way before: most of its layers are not here any more.
    """
    start, stop = bounds[stage_id], bounds[stage_id + 1]
    place = (start, stop, bounds[-1], str(device))
    if not is_built(module):
        stage = layers.build_stage(start, stop, device)
        # As a submodule it follows Lightning's train and eval modes, and its parameters are the module's.
        module.add_module("pipeline_stage", stage)
        object.__setattr__(module, "_pipelite_stage", (stage, place))  # not one more submodule
        return stage
    built: nn.Module
    built, before = module._pipelite_stage
    if before != place:
        raise ConfigurationError(
            f"this {type(module).__name__} has been split into other stages before: this process holds only its "
            f"layers {before[0]} to {before[1]}; make a new one, and pass ckpt_path to load what was trained."
        )
    return built
