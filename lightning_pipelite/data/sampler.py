"""Determines which data-parallel replica sees which sequence, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override


class PackedSampler(DistributedSampler):
    """Deals micro-batches to replicas in turn: number k of the epoch goes to replica ``k % num_replicas``.

    The order depends only on the seed and the epoch, so a different number of replicas trains on the same data. All
    replicas get the same number of micro-batches: the last round is filled up with None, which stands for the empty
    micro-batch. No sequence is dropped or seen twice. Subclasses `DistributedSampler` so that Lightning keeps it.

    Args:
        dataset: The dataset to sample; only its length is used.
        num_replicas: Number of data-parallel replicas.
        rank: This process's replica.
        shuffle: Whether to shuffle anew each epoch; otherwise the order is that of the dataset.
        seed: Seed of the shuffle.
        round_to: Fill each replica's share up to a multiple of this.

    Attributes:
        start: How many sequences of the epoch have been seen already, by any number of replicas; the next iteration
            skips them. The length stays that of a whole epoch.

    Example:
        >>> list(PackedSampler(range(5), num_replicas=2, rank=1, shuffle=False))
        [1, 3, None]
    """

    def __init__(
        self, dataset: Sized, *, num_replicas: int = 1, rank: int = 0, shuffle: bool, seed: int = 0, round_to: int = 1
    ) -> None:
        super().__init__(cast(Any, dataset), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.start = 0
        self._size = len(dataset)
        self._round_to = round_to
        self.num_samples = self.rounds_left(0)
        self.total_size = self.num_samples * num_replicas

    @property
    def sequences(self) -> int:
        """Number of sequences per epoch, over all replicas."""
        return self._size

    def rounds_left(self, start: int) -> int:
        """Return the number of micro-batches left for each replica after `start` sequences have been seen."""
        return -(-(self._size - start) // (self.num_replicas * self._round_to)) * self._round_to

    @override
    def __iter__(self) -> Iterator[int | None]:
        order = np.arange(self._size)
        if self.shuffle:
            # Seeded with the pair, not the sum: epoch 1 of seed 0 must differ from epoch 0 of seed 1.
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self._size)
        share: list[int | None] = order[self.start :][self.rank :: self.num_replicas].tolist()
        return iter(share + [None] * (self.rounds_left(self.start) - len(share)))
