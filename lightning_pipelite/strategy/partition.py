"""How the layers are split into stages."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import KnowsCosts, LayerCosts, MayBeWhole, PipelineLayers
from lightning_pipelite.strategy.interleaved_cut import InterleavedCut
from lightning_pipelite.strategy.option_ranges import check_method, check_virtual_stages

_Allowed = Callable[[int, int, int], bool]


def partition(
    layers: PipelineLayers,
    stages: int,
    method: str = "uniform",
    virtual_stages: int = 1,
    speeds: Sequence[float] = (),
) -> list[int]:
    """Cut the layers into contiguous stages, or into the pieces of virtual stages.

    Args:
        layers: The layers of the whole model.
        stages: The number of stages, at least 1.
        method: ``uniform`` (equal numbers of layers), ``parameters`` (equal numbers of parameters, including frozen
            ones), ``type:REGEX`` (equal numbers of layers whose class name matches, ignoring case), ``layers:N,N,...``
            (these numbers of layers) or ``auto`` (by the layers' costs, the slowest stage as fast as possible, where
            all fit their device).
        virtual_stages: The number of pieces per stage; piece ``i`` of the model is on stage ``i % stages``.
        speeds: The speed of each stage's device, for ``auto``; replaces the speeds of the costs.

    Returns:
        ``stages * virtual_stages + 1`` bounds: piece ``i`` has the layers from ``bounds[i]`` to ``bounds[i + 1]``,
        exclusive.

    Raises:
        ConfigurationError: If there are more pieces than layers, or the method is unknown or does not fit the layers.
    """
    check_virtual_stages(stages, virtual_stages)
    check_method(method)
    names = list(layers.names)
    if stages > 1 and isinstance(layers, MayBeWhole) and layers.one_stage_only:
        raise ConfigurationError(
            f"pipeline_stages={stages}, but this model trains in one stage only because "
            f"{layers.one_stage_only}; set pipeline_stages and virtual_stages to 1, or choose another model."
        )
    if stages > len(names):
        raise ConfigurationError(
            f"pipeline_stages={stages} is more than the {len(names)} layers of the model; use at most {len(names)}."
        )
    pieces = stages * virtual_stages
    if pieces > len(names):
        raise ConfigurationError(
            f"pipeline_stages={stages} times virtual_stages={virtual_stages} makes {pieces} pieces, more than the "
            f"{len(names)} layers of the model; set virtual_stages to at most {len(names) // stages}."
        )
    if method == "auto":
        return _auto(layers, stages, virtual_stages, speeds)
    if method.startswith("layers:"):
        return _given(method, stages, virtual_stages, len(names))
    if method == "uniform":
        weights = [1] * len(names)
    elif method == "parameters":
        weights = list(layers.parameter_counts())
    else:
        pattern = method.removeprefix("type:")
        weights = [int(bool(re.search(pattern, name, re.IGNORECASE))) for name in names]
        if not any(weights):
            raise ConfigurationError(
                f"partition_method: {pattern!r} matches none of the layer types {', '.join(sorted(set(names)))}."
            )
    return balanced_bounds(weights, pieces)


def spans_of(bounds: Sequence[int], stages: int, stage: int) -> list[tuple[int, int]]:
    """Return the first layer and the one after the last of each piece of a stage."""
    return [(bounds[piece], bounds[piece + 1]) for piece in range(stage, len(bounds) - 1, stages)]


def method_of(bounds: Sequence[int]) -> str:
    """Return the ``partition_method`` that cuts at these bounds, such as ``layers:9,7``."""
    return f"layers:{','.join(str(stop - start) for start, stop in itertools.pairwise(bounds))}"


def _given(method: str, stages: int, virtual_stages: int, items: int) -> list[int]:
    sizes = method.removeprefix("layers:").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigurationError(
            f"partition_method is {method!r}; write layers: and the number of layers of each stage, such as layers:9,7 "
            "(of each piece, in the model's order, if there are virtual_stages)."
        )
    counts = [int(size) for size in sizes]
    if len(counts) != stages * virtual_stages or sum(counts) != items:
        parts, wanted = "stages", f"pipeline_stages is {stages}"
        if virtual_stages > 1:
            product = f"pipeline_stages={stages} times virtual_stages={virtual_stages}"
            parts, wanted = "pieces", f"{product} makes {stages * virtual_stages} pieces"
        raise ConfigurationError(
            f"partition_method {method} assigns {sum(counts)} layers to {len(counts)} {parts}, but the model has "
            f"{items} layers and {wanted}."
        )
    return [0, *itertools.accumulate(counts)]


def _auto(layers: PipelineLayers, stages: int, virtual_stages: int, speeds: Sequence[float]) -> list[int]:
    costs = layers.layer_costs() if isinstance(layers, KnowsCosts) else None
    if costs is None:
        raise ConfigurationError(
            "partition_method is auto, but the layers do not report their costs; set it to uniform, parameters or "
            "type:REGEX, or give them a method layer_costs()."
        )
    if speeds:
        costs = replace(costs, speeds=speeds)
    if virtual_stages == 1:
        return cheapest_bounds(costs, stages)
    return interleaved_bounds(costs, stages, virtual_stages)


def interleaved_bounds(costs: LayerCosts, stages: int, virtual_stages: int) -> list[int]:
    """Cut layers into several pieces per stage so that a step is fast, see :class:`InterleavedCut`.

    Args:
        costs: The costs of the layers.
        stages: The number of stages.
        virtual_stages: The number of pieces per stage; all stages together have at most as many as there are layers.

    Returns:
        ``stages * virtual_stages + 1`` bounds.
    """
    pieces = range(stages * virtual_stages)
    balanced = balanced_bounds(costs.seconds, len(pieces), speeds=[costs.speed_of(piece % stages) for piece in pieces])
    even = balanced_bounds([1] * len(costs.seconds), len(pieces))
    return InterleavedCut(costs, stages, virtual_stages).best(balanced, even)


def cheapest_bounds(costs: LayerCosts, stages: int) -> list[int]:
    """Cut layers into contiguous, non-empty stages whose slowest is as fast as possible.

    Only cuts whose stages all fit in memory count; if there is none, the result is the cut whose worst stage exceeds
    its memory least. Stage i of p keeps the activations of up to p - i micro-batches (1F1B).

    Args:
        costs: The costs of the layers.
        stages: The number of stages, at most the number of layers.

    Returns:
        ``stages + 1`` bounds, exact by dynamic programming; among equally good cuts, the one with the smallest sum of
        squared stage times.
    """
    held, retained = ([0, *itertools.accumulate(row)] for row in (costs.held, costs.retained))

    def excess(stage: int, start: int, stop: int) -> float:
        in_flight = min(costs.micro_batches, stages - stage)
        bytes_of_all = held[stop] - held[start] + in_flight * (retained[stop] - retained[start])
        return bytes_of_all - costs.memory_of(stage)

    speeds = [costs.speed_of(stage) for stage in range(stages)]
    fitting = balanced_bounds(costs.seconds, stages, lambda *part: excess(*part) <= 0, speeds)
    return fitting or _least_cut(len(costs.seconds), stages, excess, max)


def balanced_bounds(
    weights: Sequence[float], parts: int, allowed: _Allowed = lambda *_: True, speeds: Sequence[float] = ()
) -> list[int]:
    """Cut a row of weights into contiguous, non-empty parts whose heaviest is as light as possible.

    Among those cuts it takes the one with the smallest sum of squares, which evens out the other parts; with equal
    weights the larger parts come first.

    Args:
        weights: One non-negative weight per item.
        parts: The number of parts, at most ``len(weights)``.
        allowed: Whether a part may be cut like this; called with its number, its first item and the item after its
            last.
        speeds: Positive numbers by which the parts' weights are divided; none if they are all 1.

    Returns:
        ``parts + 1`` bounds; empty if no cut has only allowed parts.
    """
    total = [0, *itertools.accumulate(weights)]

    def weight(part: int, start: int, stop: int) -> float:
        return (total[stop] - total[start]) / (speeds[part] if speeds else 1)

    bounds = _least_cut(len(weights), parts, weight, max, allowed)
    if not bounds:
        return []
    # Sums of the same weights may round differently, depending on where they start.
    heaviest = (1 + 1e-9) * max(weight(part, *span) for part, span in enumerate(itertools.pairwise(bounds)))
    return _least_cut(
        len(weights),
        parts,
        lambda *part: weight(*part) ** 2,
        operator.add,
        lambda *part: allowed(*part) and weight(*part) <= heaviest,
    )


def _least_cut(
    items: int,
    parts: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
    allowed: _Allowed = lambda *_: True,
) -> list[int]:
    """Return the cut into allowed parts with the least joined cost, by dynamic programming; empty if there is none."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0, 0)}]  # by parts: {items cut: (cost, -start of the last)}
    for part in range(parts):
        row = {}
        for stop in range(part + 1, items - (parts - part - 1) + 1):
            found = [
                (join(so_far, cost(part, start, stop)), -start)
                for start, (so_far, _) in best[-1].items()
                if start < stop and allowed(part, start, stop)
            ]
            if found:
                row[stop] = min(found)
        best.append(row)
    if items not in best[-1]:
        return []
    bounds = [items]
    for row in best[:0:-1]:
        bounds.append(-row[bounds[-1]][1])
    return bounds[::-1]
