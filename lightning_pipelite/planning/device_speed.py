"""How fast a GPU is beside others, measured in a moment."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

ALIKE = 0.05
"""Share by which the speeds of devices of one kind may differ: by their clocks and what else runs."""
SECONDS = 0.3
_SIZE = 4096


def measured_speed(device: torch.device) -> float:
    """Return the operations a second of products in bfloat16, of which training mostly consists.

    All ranks measure at once, so that of those that share a GPU each has its share.

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
    """Return speeds relative to the fastest, to two digits; empty if they are alike.

    Args:
        speeds: As measured.
    """
    fastest = max(speeds)
    if min(speeds) >= (1 - ALIKE) * fastest:
        return ()
    return tuple(round(speed / fastest, 2) for speed in speeds)
