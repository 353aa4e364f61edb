"""The metrics of an evaluation over one or several sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch


class Evaluation:
    """Collects the losses of evaluation sets, which come in order.

    Args:
        names: Names of the sets.
        kind: Prefix of the metrics' names.
    """

    def __init__(self, names: Sequence[str], kind: str = "eval") -> None:
        self._names, self._kind = names, kind
        self._sums: list[tuple[float, float]] = []

    @classmethod
    def of_run(cls, trainer: pl.Trainer, names: Sequence[str]) -> Evaluation:
        """Begin the evaluation, or the test, that a Trainer runs.

        Args:
            trainer: Its loaders may have names.
            names: Names of the sets if the loaders have none; if their count differs, the sets are numbered instead.
        """
        sets: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        number = len(sets) if isinstance(sets, (Mapping, list)) else 1
        names = [*sets] if isinstance(sets, Mapping) else names
        names = names if len(names) == number else [str(i) for i in range(number)]
        return cls(names, "test" if trainer.testing else "eval")

    def add(self, total: float, count: float) -> dict[str, float]:
        """Add the next set's summed loss and number of tokens; return the metrics to log.

        Returns:
            ``eval/loss/NAME`` if there are several sets, and with the last set ``eval/loss``, the mean over all tokens
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
