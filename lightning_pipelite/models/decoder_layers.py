"""Finds by a trial run which modules of a causal LM are its decoder layers, and where it can be cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lightning_pipelite.errors import first_line
from lightning_pipelite.models.probe import Probe
from lightning_pipelite.models.trace import START, Trace

NOT_IN_ORDER = "its decoder layers do not run once each in order"


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model and the modules around them; see :class:`~lightning_pipelite.models.MetaModel`."""

    layers_name: str
    layers: list[nn.Module]
    start_names: list[str]
    tail_names: list[str]
    groups: list[int]
    tuple_lengths: list[int]
    start_inputs: list[list[int | str]]
    shared_inputs: list[list[str]]
    one_stage_only: str | None


def find_decoder_layers(model: PreTrainedModel, probe: Probe, embedding_name: str, head_name: str) -> DecoderLayers:
    """Find the list of modules that run once each, in order, between the embedding and the head.

    If there is no such list, or all its layers need each other's state, the model cannot be cut, and
    ``one_stage_only`` says why.

    Args:
        model: The real model; may be on the meta device.
        probe: A tiny model of its class and depth.
        embedding_name: Name of the input embedding.
        head_name: Name of the output projection.

    Raises:
        ValueError: The trial fails, or the model has no list of modules.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 0]
    weighted = [name for name, m in modules.items() if any(p is not None for p in m._parameters.values())]
    outermost = [name for name in lists if not any(name.startswith(outer + ".") for outer in lists)]
    tried: list[DecoderLayers] = []
    for name in sorted(outermost, key=lambda name: -sum(p.numel() for p in modules[name].parameters())):
        try:
            found = _try_layers(model, probe, name, weighted, (embedding_name, head_name))
        except Exception as error:
            raise ValueError(f"a trial forward failed: {first_line(error)}") from error
        if found.one_stage_only is None:
            return found
        tried.append(found)
    if not tried:
        raise ValueError("it has no list of decoder layers")
    return next((found for found in tried if found.one_stage_only != NOT_IN_ORDER), tried[0])


def _try_layers(
    model: PreTrainedModel, probe: Probe, layers_name: str, weighted: list[str], ends: tuple[str, str]
) -> DecoderLayers:
    """Treat the list ``layers_name`` as the decoder layers, and examine it.

    Args:
        model: The real model.
        probe: The tiny one.
        layers_name: Name of the list.
        weighted: Names of all modules that have weights of their own.
        ends: Names of embedding and head.
    """
    layers = list(model.get_submodule(layers_name))
    names = [f"{layers_name}.{number}" for number in range(len(layers))]
    outside = [name for name in weighted if not name.startswith(f"{layers_name}.")]
    trace = probe.trace(names, outside)
    first = next((i for i, name in enumerate(trace.order) if name in names), 0)
    start = [name for name in outside if name in trace.order[:first]]
    tail = [name for name in outside if name not in start]
    unfit = _why_unfit(trace, names, start, tail, ends)
    if getattr(model.get_submodule(layers_name.rpartition(".")[0]), "layerdrop", 0):  # transformers' name for it
        unfit = (
            unfit
            or "layerdrop skips decoder layers at random in training (if it is 0 in config.json, the model can be cut)"
        )
    groups = [0, len(layers)]
    if unfit is None:
        cuts = [cut for cut in range(1, len(layers)) if not any(i < cut <= j for i, j in trace.carried)]
        groups = [0, *cuts, len(layers)]
        if not cuts and len(layers) > 1:
            source = (
                "values computed before them" if any(i == START for i, _ in trace.carried) else "each other's state"
            )
            unfit = f"all its decoder layers need {source} in addition to the hidden states"
    return DecoderLayers(
        layers_name=layers_name,
        layers=layers,
        start_names=start,
        tail_names=tail,
        groups=groups,
        tuple_lengths=trace.tuple_lengths,
        start_inputs=trace.start_inputs,
        shared_inputs=[shared for shared in trace.shared_inputs if len(shared) > 1],
        one_stage_only=unfit,
    )


def _why_unfit(trace: Trace, names: list[str], start: list[str], tail: list[str], ends: tuple[str, str]) -> str | None:
    """Return why the modules ``names`` do not pass hidden states from start to tail; None if they do."""
    order = trace.order
    if [name for name in order if name in names] != names:
        return NOT_IN_ORDER
    if trace.hidden_missing:
        return "its decoder layers do not take hidden states as their first argument"
    first, last = order.index(names[0]), order.index(names[-1])
    misplaced = {name for name in start if name in order[first:]}
    misplaced |= {name for name in tail if name in order[:last] or name not in order}
    if misplaced:
        more = f" and {len(misplaced) - 2} more" if len(misplaced) > 2 else ""
        return (
            f"it has weights in {', '.join(sorted(misplaced)[:2])}{more} that are not used only before or only after "
            "its layers"
        )
    if shapeless := [name for name in start if name in trace.without_tensors]:
        return f"{shapeless[0]} is called with sizes only, so no stub can replace it on later stages"
    if ends[0] not in start or ends[1] not in tail:
        return "it does not run its embedding, decoder layers and head in this order"
    return None
