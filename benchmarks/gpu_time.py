"""Times of functions on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

HEAD_START = 2_000_000  # cycles, about a millisecond, by which the host runs ahead, as in training


def milliseconds(*functions: Callable[[], object]) -> list[float]:
    """Return the median time of a call of each function: 20 calls after 5 of warm-up, by CUDA events.

    The functions take turns, as a GPU's clock falls while it warms up.
    """
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(25):
        for function, taken in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end))
    return [sorted(taken[5:])[10] for taken in times]
