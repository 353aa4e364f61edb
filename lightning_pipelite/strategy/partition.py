"""Which layers go to which stage."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.layers import PipelineLayers


def partition(layers: PipelineLayers, stages: int, method: str = "uniform") -> list[int]:
    """Cut the layers into contiguous stages.

    Args:
        layers: the layers of the whole model.
        stages: the number of stages, at least 1.
        method: ``uniform`` (the same number of layers a stage), ``parameters`` (the same number of parameters, frozen
            ones too) or ``type:REGEX`` (the same number of layers whose class name matches; case is ignored).

    Returns:
        ``stages + 1`` bounds: stage ``i`` has the layers from ``bounds[i]`` to ``bounds[i + 1]``, exclusive.

    Raises:
        ConfigurationError: if there are more stages than layers, or the method is unknown or matches nothing.
    """
    names = list(layers.names)
    if stages > len(names):
        raise ConfigurationError(
            f"pipeline_stages={stages} is more than the {len(names)} layers of the model; use at most {len(names)}."
        )
    if method == "uniform":
        weights = [1] * len(names)
    elif method == "parameters":
        weights = list(layers.parameter_counts())
    elif method.startswith("type:"):
        pattern = method.removeprefix("type:")
        try:
            weights = [int(bool(re.search(pattern, name, re.IGNORECASE))) for name in names]
        except re.error as error:
            raise ConfigurationError(f"partition_method: {pattern!r} is not a regular expression ({error}).") from None
        if not any(weights):
            raise ConfigurationError(
                f"partition_method: {pattern!r} matches none of the layer types {', '.join(sorted(set(names)))}."
            )
    else:
        raise ConfigurationError(f"partition_method must be uniform, parameters or type:REGEX, not {method!r}.")
    return balanced_bounds(weights, stages)


def balanced_bounds(weights: Sequence[int], parts: int) -> list[int]:
    """Cut a row of weights into contiguous, non-empty parts whose heaviest is as light as possible.

    Among the cuts with the lightest heaviest part it takes the one with the least sum of squares, which evens out the
    others; with equal weights the larger parts come first.

    Args:
        weights: one non-negative weight an item.
        parts: the number of parts, at most ``len(weights)``.

    Returns:
        ``parts + 1`` bounds.
    """
    total = [0, *itertools.accumulate(weights)]
    bounds = _cut(total, parts, math.inf, max, lambda weight: weight)
    heaviest = max(total[stop] - total[start] for start, stop in itertools.pairwise(bounds))
    return _cut(total, parts, heaviest, operator.add, lambda weight: weight**2)


def _cut(
    total: list[int], parts: int, limit: float, join: Callable[[int, int], int], cost: Callable[[int], int]
) -> list[int]:
    """The cut with the least joined cost of its parts, none of them heavier than ``limit`` (dynamic programming)."""
    items = len(total) - 1
    best = [{0: (0, 0)}]  # for each number of parts: {items cut so far: (cost, minus where the last part starts)}
    for part in range(1, parts + 1):
        row = {}
        for stop in range(part, items - (parts - part) + 1):
            candidates = [
                (join(so_far, cost(total[stop] - total[start])), -start)
                for start, (so_far, _) in best[-1].items()
                if start < stop and total[stop] - total[start] <= limit
            ]
            if candidates:
                row[stop] = min(candidates)
        best.append(row)
    bounds = [items]
    for part in range(parts, 0, -1):
        bounds.append(-best[part][bounds[-1]][1])
    return bounds[::-1]
