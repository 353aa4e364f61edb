"""What an evaluation over one or several sets comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Evaluation:
    """Collects the losses of evaluation sets, which come in order.

    Args:
        names: Of the sets.
        kind: What the names of the metrics begin with.
    """

    def __init__(self, names: Sequence[str], kind: str = "eval") -> None:
        self._names, self._kind = names, kind
        self._sums: list[tuple[float, float]] = []

    def add(self, total: float, count: float) -> dict[str, float]:
        """Add the next set's summed loss and number of tokens; return what there is to log.

        Returns:
            ``eval/loss/NAME``, if there are several sets; and with the last one ``eval/loss``, the mean over all tokens
            of all sets, and ``eval/perplexity``, its exponential.
        """
        metrics = {}
        if len(self._names) > 1:
            metrics[f"{self._kind}/loss/{self._names[len(self._sums)]}"] = total / count if count else math.nan
        self._sums.append((total, count))
        if len(self._sums) == len(self._names):
            totals, counts = (sum(column) for column in zip(*self._sums, strict=True))
            loss = totals / counts if counts else math.nan
            perplexity = torch.tensor(loss).exp().item()  # inf, not an error
            metrics |= {f"{self._kind}/loss": loss, f"{self._kind}/perplexity": perplexity}
            self._sums = []
        return metrics
