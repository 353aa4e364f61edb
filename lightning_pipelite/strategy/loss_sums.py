"""The sums of the losses of micro-batches, as they are shared between the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.async_scalar import AsyncScalar
from lightning_pipelite.shared.protocol import Loss, names_of_sums
from lightning_pipelite.strategy.agreement import ADVICE, DIFFERENT
from lightning_pipelite.strategy.micro_batches import MicroBatch, fingerprint


class LossSums:
    """The sum and the count of the losses of some micro-batches, and the sums of what the loss wants logged.

    Inputs from one sequence with targets from another would train on nonsense without any other sign. So with several
    stages there is one more number: first stages add the fingerprint of their micro-batches, last stages subtract that
    of theirs, and the sum over all ranks must be 0.

    Args:
        loss: The loss of one micro-batch.
        stage_id: This rank's stage.
        stages: The number of stages.
        device: The device of the sums.

    Attributes:
        tensor: This rank's contribution to the sums over all ranks, float64.
        on_host: Its asynchronous copy to the host, started when the last micro-batch has been added; None until then.
    """

    def __init__(self, loss: Loss, stage_id: int, stages: int, device: torch.device) -> None:
        self._loss, self._compares = loss, stages > 1
        self._sign = 1 if stage_id == 0 else -1 if stage_id == stages - 1 else 0
        terms = 2 + len(names_of_sums(loss)) + self._compares
        self._adds = stage_id == stages - 1
        self._to_come = 0
        self.tensor = torch.zeros(terms, dtype=torch.float64, device=device)
        self.on_host: AsyncScalar | None = None

    @contextlib.contextmanager
    def counted_by(self, loss: Loss) -> Iterator[None]:
        """Use another loss inside the context; it must not return more terms than the original one."""
        own, self._loss = self._loss, loss
        try:
            yield
        finally:
            self._loss = own

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Reset the sums for these micro-batches."""
        self.tensor.zero_()
        if self._compares and self._sign:
            self.tensor[-1] = self._sign * fingerprint(micro_batches, self.tensor.device)
        self._to_come = len(micro_batches) if self._adds else 0
        self.on_host = None if self._to_come else AsyncScalar(self.tensor)

    def add(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of a micro-batch, and add it and what is logged with it to the sums."""
        terms = self._loss(outputs, targets)
        loss, *others = terms if isinstance(terms, tuple) else (terms, torch.ones_like(terms))
        stacked = torch.stack([term.detach().to(self.tensor) for term in (loss, *others)])
        self.tensor[: len(stacked)] += stacked
        self._to_come -= 1
        if not self._to_come:
            self.on_host = AsyncScalar(self.tensor)
        return loss

    def require_same_data(self, shared: list[float], place: str) -> list[float]:
        """Raise if first and last stages had different data.

        Args:
            shared: The sums over all ranks.
            place: Where in the run, for the message.

        Returns:
            The sums without the number that this check adds.

        Raises:
            ConfigurationError: On every rank.
        """
        if not self._compares:
            return shared
        *sums, difference = shared
        if difference:
            raise ConfigurationError(f"{DIFFERENT} in {place}; {ADVICE}")
        return sums
