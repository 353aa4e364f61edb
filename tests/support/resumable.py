"""Training over sequences dealt out from a position that a checkpoint restores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Deal:
    """A data loader whose position counts micro-batches of the whole job: number k goes to replica k % replicas.

    Each epoch has its own order. The last round is padded with micro-batches without labels.

    Args:
        items: Dicts of tensors of shape (sequence,), or pairs (inputs, targets); ``labels`` and targets may be -100.
        num_replicas: The number of replicas.
        rank: This process's replica.
    """

    def __init__(self, items: Sequence[Any], *, num_replicas: int = 1, rank: int = 0) -> None:
        self._items, self._replicas, self._replica = items, num_replicas, rank
        self._epoch, self._taken, self._resumed = 0, 0, (0, 0)
        self.batch_sampler = SimpleNamespace(sampler=self)  # where Lightning looks for set_epoch()

    def __len__(self) -> int:
        return -(-len(self._items) // self._replicas)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, taken = self._resumed
        self._taken = taken if epoch == self._epoch else 0
        generator = torch.Generator().manual_seed(self._epoch)
        order = torch.randperm(len(self._items), generator=generator).tolist()
        while self._taken < len(order):
            mine = self._taken + self._replica
            self._taken += self._replicas
            yield self._items[order[mine]] if mine < len(order) else _without_labels(self._items[order[0]])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._resumed = state["epoch"], state["taken"]


def _without_labels(item: Any) -> Any:
    if isinstance(item, dict):
        return {**item, "labels": torch.full_like(item["labels"], -100)}
    inputs, targets = item
    return inputs, torch.full_like(targets, -100)


def batched(sequences: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return each sequence as a micro-batch of one."""
    return [{key: tensor[None] for key, tensor in sequence.items()} for sequence in sequences]
