"""Measures the speed of a GPU relative to others in a moment."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

ALIKE = 0.05
"""Share by which the speeds of devices of one kind may differ, because of their clocks and other load."""
SECONDS = 0.3
_SIZE = 4096


def measured_speed(device: torch.device) -> float:
    """Return the operations per second of bfloat16 matrix products, which dominate training.

    All ranks measure at the same time, so that ranks which share a GPU each measure their share.

    Args:
        device: A GPU.
    """
    a, b, out = (torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=device) for _ in range(3))
    for _ in range(3):
        torch.mm(a, b, out=out)
    torch.cuda.synchronize(device)
    began, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SECONDS:
        for _ in range(20):
            torch.mm(a, b, out=out)
        torch.cuda.synchronize(device)
        products += 20
    return 2 * _SIZE**3 * products / passed


def relative(speeds: Sequence[float]) -> tuple[float, ...]:
    """Return speeds relative to the fastest, to two decimals; empty if they are alike.

    Args:
        speeds: The measured speeds.
    """
    fastest = max(speeds)
    if min(speeds) >= (1 - ALIKE) * fastest:
        return ()
    return tuple(round(speed / fastest, 2) for speed in speeds)
