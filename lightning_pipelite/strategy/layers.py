"""The layers of a LightningModule and the loss on the last one's output, as it hands them to the strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import HandsOutLayers, Loss, PipelineLayers
from lightning_pipelite.strategy.pieces import Pieces, in_words

_ADDED, _RECORD = "pipeline_stage", "_pipelite_stage"


class SequentialLayers:
    """A plain list of modules as pipeline layers: each takes the output of the one before.

    Args:
        layers: The modules, in order. A module may occur several times, and several modules may share a parameter; both
            tie it.
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
        # Named after its first layer, a shared parameter would have another name in a stage without that layer.
        self._shared = {f"shared_{i}": parameters[p] for i, p in enumerate(p for p in owners if len(owners[p]) > 1)}
        self.names = [type(layer).__name__ for layer in layers]

    def parameter_counts(self) -> list[int]:
        """Count the parameters of each layer, frozen ones too."""
        return [sum(p.numel() for p in layer.parameters()) for layer in self._layers]

    def drop_all_but(self, spans: Sequence[tuple[int, int]]) -> None:
        """Move the weights of all layers outside the spans to the meta device."""
        kept = {id(module) for span in spans for layer in self._layers[slice(*span)] for module in layer.modules()}
        for module in (module for layer in self._layers for module in layer.modules()):
            if id(module) not in kept:
                module._apply(lambda tensor: tensor.to("meta"), recurse=False)

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        """Chain layers ``start`` to ``stop`` (exclusive) on a device."""
        # A layer is named after its first position in the model, in every stage.
        first = {id(layer): index for index, layer in reversed(list(enumerate(self._layers)))}
        mine = self._layers[start:stop]
        for layer in mine:
            layer.to(device)
        here = {id(p) for layer in mine for p in layer.parameters()}
        shared = {name: p for name, p in self._shared.items() if id(p) in here}
        return Chain([(str(first[id(layer)]), layer) for layer in mine], shared)


class Chain(nn.Module):
    """Modules called in sequence, registered under given names; a module that is repeated is registered once."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], shared: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in shared.items():  # before the layers, so that this name takes precedence
            self.register_parameter(name, parameter)
        for name, layer in layers:
            self.add_module(name, layer)
        self._order = [name for name, _ in layers]

    def forward(self, inputs: Any) -> Any:
        """Call the layers in order."""
        for name in self._order:
            inputs = self._modules[name](inputs)  # type: ignore[misc]
        return inputs


def hand_out_layers(module: Any) -> tuple[PipelineLayers, Loss]:
    """Ask a LightningModule for its layers and its loss.

    Args:
        module: A LightningModule that is a :class:`~lightning_pipelite.shared.protocol.HandsOutLayers`.

    Raises:
        ConfigurationError: If it has no such method, or the method returns something else.
    """
    if not isinstance(module, HandsOutLayers):
        raise ConfigurationError(
            f"{type(module).__name__} has no method pipeline_layers(); "
            "PipeLiteStrategy needs one that returns (layers, loss)."
        )
    handed: Any = module.pipeline_layers()
    if not isinstance(handed, tuple) or len(handed) != 2 or not callable(handed[1]):
        raise ConfigurationError(f"{type(module).__name__}.pipeline_layers() must return a pair (layers, loss).")
    layers, loss = handed
    if not isinstance(layers, PipelineLayers):
        layers = SequentialLayers(layers)
    return layers, loss


def is_built(module: Any) -> bool:
    """Whether a LightningModule has its stage from an earlier run, which :func:`build_stage` then returns."""
    return getattr(module, _RECORD, None) is not None


def build_stage(
    module: Any, layers: PipelineLayers, spans: Sequence[tuple[int, int]], number: int, device: torch.device
) -> nn.Module:
    """Build a stage, or return the one from the module's previous run, with its trained weights.

    Parts of the stage whose weights do not belong to the module yet become its submodule ``pipeline_stage``, so that
    their parameters are the module's.

    Args:
        module: The LightningModule.
        layers: Its layers.
        spans: The first layer and the one after the last of each piece of the stage; a single piece unless there are
            virtual stages.
        number: The number of layers of the model.
        device: Where it is built.

    Raises:
        ConfigurationError: If the module was split differently before: most of its layers are no longer in this
            process.
    """
    place = (tuple(spans), number)
    if is_built(module):
        built: nn.Module
        built, before = getattr(module, _RECORD)
        if before != place:
            held = " and ".join(map(in_words, before[0]))
            raise ConfigurationError(
                f"this {type(module).__name__} was already split into different stages: this process holds only its "
                f"{held}; create a new one, and pass ckpt_path to load the trained weights."
            )
        return built.to(device)
    if isinstance(layers, SequentialLayers):
        layers.drop_all_but(spans)
    pieces = [layers.build_stage(start, stop, device) for start, stop in spans]
    stage = pieces[0] if len(pieces) == 1 else Pieces(pieces, spans)
    parameters = (parameter for part in module.modules() for parameter in part._parameters.values())
    known = {id(known) for known in (*module.modules(), *parameters, *module.buffers())}
    if added := list(_not_among(stage, known)):
        module.add_module(_ADDED, stage if added == [stage] else nn.ModuleList(added))
    object.__setattr__(module, _RECORD, (stage, place))  # not as a submodule
    return stage


def keeps_stage(module: nn.Module) -> bool:
    """Whether :func:`build_stage` added a submodule: the stage, or the parts of it that the module did not have."""
    return _ADDED in module._modules


def release_stage(module: Any) -> bool:
    """Restore the module at the end of a run, with the trained weights under its own names.

    Layers whose weights were created by ``pipeline_layers()`` stay in the module for the next run. The stage also stays
    if there are others, because their layers are no longer in this process.

    Returns:
        Whether the module is complete, with nothing added.
    """
    _, (spans, number) = getattr(module, _RECORD)
    is_whole = not keeps_stage(module) and spans == ((0, number),)
    if is_whole:
        del module.__dict__[_RECORD]
    return is_whole


class LooseParts:
    """The parts of a stage that are not submodules of its LightningModule, such as an activation created on the fly.

    Lightning does not see them when it switches between training and evaluation mode.

    Args:
        module: The LightningModule.
        stage: Its stage.
    """

    def __init__(self, module: nn.Module, stage: nn.Module) -> None:
        known = {id(submodule) for submodule in module.modules()}
        self._module = module
        self._parts = [(part, part.training) for part in stage.modules() if id(part) not in known]

    def follow(self) -> None:
        """Put the parts into the module's mode; a part built in evaluation mode, such as a frozen norm, stays in it."""
        for part, trains in self._parts:
            part.training = trains and self._module.training


def _not_among(part: nn.Module, known: set[int]) -> Iterator[nn.Module]:
    """Yield the largest parts of a module that have weights outside ``known``."""
    if id(part) in known:
        return
    new = [id(tensor) not in known for tensor in (*part.parameters(), *part.buffers())]
    own = [id(tensor) not in known for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))]
    if (new and all(new)) or any(own):
        yield part
    else:
        for child in part.children():
            yield from _not_among(child, known)
