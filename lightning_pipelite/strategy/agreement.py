"""Numbers that the ranks exchange on the host, and how ranks that have diverged are detected."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology

_BITS = 32  # a digest times a factor is exact in float64 for up to 2048 ranks


class Agreement:
    """Sums a few numbers over all ranks, and checks that all ranks are at the same place in the training.

    Ranks can diverge, for example because their data loaders differ in length. They would then wait for each other
    until the timeout, or carry on with each other's numbers. All messages go through one process group, so a message
    that one rank sends at one place meets another rank's from elsewhere, and both notice. Construction is collective.

    Args:
        topology: The job's topology.
        rank: The global rank of this process.
        timeout: How long a rank waits for the others.
    """

    def __init__(self, topology: Topology, rank: int, timeout: timedelta) -> None:
        self._topology, self._rank = topology, rank
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if topology.world_size > 1 else None
        # The factors of all ranks sum to 0, and so do their products with a number that is the same on every rank.
        self._factor = _factor(rank, topology.world_size)
        self._factor_of_stage = _factor(topology.stage_of(rank), topology.stages)

    def close(self) -> None:
        """Drop the process group, which is about to be destroyed, so that nothing keeps it alive."""
        self._group = None

    def tell(self, place: str, micro_batches: str = "", noted: int = 0) -> int:
        """Report where this rank is. Collective.

        Args:
            place: A description of the place; it must be the same on all ranks.
            micro_batches: A description of the micro-batches; it must be the same on all stages of a pipeline.
            noted: A number that all ranks should learn of; 0 for nothing.

        Returns:
            The largest number that any rank has noted.

        Raises:
            ConfigurationError: On every rank, if the places or a pipeline's micro-batches differ.
        """
        if self._group is None:
            return noted
        factors = self._factor * _digest(place), self._factor_of_stage * _digest(micro_batches)
        sums = torch.tensor([int(noted > 0), *factors])
        dist.all_reduce(sums, group=self._group)
        noters, *parted = sums.tolist()
        if any(parted):
            self._explain(place, micro_batches)
        largest = torch.tensor(noted)
        if noters:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def add_up(self, numbers: list[float], place: str) -> list[float]:
        """Return the sums of the numbers over all ranks, the same on every rank. Collective.

        Args:
            numbers: This rank's numbers, equally many on all ranks.
            place: A description of where this rank is; it must be the same on all ranks.

        Raises:
            ConfigurationError: On every rank, if the places differ.
        """
        if self._group is None:
            return numbers
        sums = torch.tensor([*numbers, self._factor * _digest(place)], dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        *added, parted = sums.tolist()
        if parted:
            self._explain(place, "")
        return added

    def _explain(self, place: str, micro_batches: str) -> None:
        everyones = [("", "")] * self._topology.world_size
        dist.all_gather_object(everyones, (place, micro_batches), group=self._group)
        for rank, (theirs, _) in enumerate(everyones):
            if theirs != everyones[0][0]:
                raise ConfigurationError(
                    f"the ranks have diverged: rank 0 is at {everyones[0][0]}, rank {rank} at {theirs}; make their "
                    "data loaders yield the same number of batches, and let no control flow depend on the rank."
                )
        for rank, (_, theirs) in enumerate(everyones):
            first = self._topology.rank_of(0, self._topology.replica_of(rank))
            if theirs != everyones[first][1]:
                own = everyones[first][1]
                raise ConfigurationError(
                    f"{DIFFERENT} at {place}: rank {first} has {own}, rank {rank} has {theirs}; {ADVICE}"
                )


DIFFERENT = "the stages of a pipeline were given different micro-batches"
ADVICE = (
    "make sure that the data loader's order and random numbers depend on nothing that differs between ranks (call "
    "L.seed_everything(SEED) at the start), and pass the strategy's distributed_sampler_kwargs to its sampler."
)


def _factor(number: int, of: int) -> int:
    return number + 1 if number < of - 1 else -(of * (of - 1) // 2)


def _digest(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=_BITS // 8).digest(), "little")
