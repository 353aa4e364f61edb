"""How close a mixture of experts comes to a tie, in which rounding decides which expert a token is given to.

Two ways to compute the same then take different experts, and their results differ by more than rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TIE = 1e-6  # of scores about 1, whose rounding errors are about 1e-7


class ClosestChoice(TorchFunctionMode):
    """While it is entered, observes each call of ``torch.topk``, by which routers choose.

    Attributes:
        gap: The smallest difference between the last score that was taken and the first that was left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gap = math.inf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            self._observe(*args, **kwargs)
        return func(*args, **kwargs)

    def _observe(self, scores: torch.Tensor, k: int, dim: int = -1, largest: bool = True, **_: Any) -> None:
        if 0 < k < scores.shape[dim]:
            ordered = scores.detach().sort(dim=dim, descending=largest).values
            gaps = ordered.narrow(dim, k - 1, 1) - ordered.narrow(dim, k, 1)
            self.gap = min(self.gap, gaps.abs().min().item())
