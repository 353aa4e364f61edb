"""Which layers go to which stage."""

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
        method: ``uniform`` (the same number of layers a stage), ``parameters`` (the same number of parameters, frozen
            ones too), ``type:REGEX`` (the same number of layers whose class name matches; case is ignored) or ``auto``
            (the slowest stage as fast as possible, where all fit their device; by the layers' costs).
        virtual_stages: The number of pieces of each stage; piece ``i`` of all is on stage ``i % stages``.
        speeds: Of each stage's device, for ``auto``, in place of those of the costs.

    Returns:
        ``stages * virtual_stages + 1`` bounds: piece ``i`` has the layers from ``bounds[i]`` to ``bounds[i + 1]``,
        exclusive.

    Raises:
        ConfigurationError: If there are more pieces than layers, or the method is unknown or matches nothing.
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
            f"pipeline_stages={stages} times virtual_stages={virtual_stages} are {pieces} pieces, more than the "
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
            f"partition_method is {method!r}; write layers: and the layers of each stage, such as 9,7 (of each piece, "
            "in the model's order, where there are virtual_stages)."
        )
    counts = [int(size) for size in sizes]
    if len(counts) != stages * virtual_stages or sum(counts) != items:
        parts, wanted = "stages", f"pipeline_stages is {stages}"
        if virtual_stages > 1:
            product = f"pipeline_stages={stages} times virtual_stages={virtual_stages}"
            parts, wanted = "pieces", f"{product} are {stages * virtual_stages} pieces"
        raise ConfigurationError(
            f"partition_method {method} deals {sum(counts)} layers out to {len(counts)} {parts}; the model has {items} "
            f"and {wanted}."
        )
    return [0, *itertools.accumulate(counts)]


def _auto(layers: PipelineLayers, stages: int, virtual_stages: int, speeds: Sequence[float]) -> list[int]:
    costs = layers.layer_costs() if isinstance(layers, KnowsCosts) else None
    if costs is None:
        raise ConfigurationError(
            "partition_method is auto, but the layers do not say what they cost; set it to uniform, parameters or "
            "type:REGEX, or give them a method layer_costs()."
        )
    if speeds:
        costs = replace(costs, speeds=speeds)
    if virtual_stages == 1:
        return cheapest_bounds(costs, stages)
    return interleaved_bounds(costs, stages, virtual_stages)


def interleaved_bounds(costs: LayerCosts, stages: int, virtual_stages: int) -> list[int]:
    """Cut layers into several pieces a stage with which a step is fast, see :class:`InterleavedCut`.

    Args:
        costs: Of the layers.
        stages: Of the pipeline.
        virtual_stages: Pieces of each, no more of all stages than there are layers.

    Returns:
        ``stages * virtual_stages + 1`` bounds.
    """
    pieces = range(stages * virtual_stages)
    balanced = balanced_bounds(costs.seconds, len(pieces), speeds=[costs.speed_of(piece % stages) for piece in pieces])
    even = balanced_bounds([1] * len(costs.seconds), len(pieces))
    return InterleavedCut(costs, stages, virtual_stages).best(balanced, even)


def cheapest_bounds(costs: LayerCosts, stages: int) -> list[int]:
    """Cut layers into contiguous, non-empty stages whose slowest is as fast as possible.

    Only cuts whose stages all fit their memory count; if there is none, the one with the least bytes too many in a
    stage. Stage i of p keeps the activations of up to p - i micro-batches (1F1B).

    Args:
        costs: Of the layers.
        stages: At most the number of layers.

    Returns:
        ``stages + 1`` bounds, exact by dynamic programming; of equally good ones that with the least sum of squares of
        the stages' times.
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

    Among the cuts with the lightest heaviest part it takes the one with the least sum of squares, which evens out the
    others; with equal weights the larger parts come first.

    Args:
        weights: One non-negative weight an item.
        parts: The number of parts, at most ``len(weights)``.
        allowed: Of a part's number, its first item and the item after its last: whether it may be cut like this.
        speeds: By which each part's weight is divided; positive.

    Returns:
        ``parts + 1`` bounds; none if no cut has only parts that are allowed.
    """
    total = [0, *itertools.accumulate(weights)]

    def weight(part: int, start: int, stop: int) -> float:
        return (total[stop] - total[start]) / (speeds[part] if speeds else 1)

    bounds = _least_cut(len(weights), parts, weight, max, allowed)
    if not bounds:
        return []
    # Sums of the same weights differ by the rounding of where they start.
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
    best: list[dict[int, tuple[float, int]]] = [{0: (0, 0)}]  # by parts: {items cut: (cost, minus the last's start)}
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
