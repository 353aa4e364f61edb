"""What the ranks tell each other on the host, and how it is seen that they have parted."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology

_BITS = 32  # products with factors, of up to 2048 ranks, are exact in float64


class Agreement:
    """A few numbers, added up over all ranks: what they note, and whether all are at the same place of the training.

    Ranks that part, because their data loaders are of different lengths, say, would wait for each other until the
    time-out, or work on with each other's numbers. All that they say here goes over one process group, so what one
    says at one place meets what another says at another, and both see it. Building it is collective.

    Args:
        topology: Of the job.
        rank: Of this process.
        timeout: How long a rank waits for the others.
    """

    def __init__(self, topology: Topology, rank: int, timeout: timedelta) -> None:
        self._topology, self._rank = topology, rank
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if topology.world_size > 1 else None
        # The sum of all ranks' factors is 0, so that of the products with equal numbers is.
        self._factor = _factor(rank, topology.world_size)
        self._factor_of_stage = _factor(topology.stage_of(rank), topology.stages)

    def close(self) -> None:
        """Let go of the group, which is about to be destroyed, so that nothing of it lives on."""
        self._group = None

    def tell(self, place: str, micro_batches: str = "", noted: int = 0) -> int:
        """Say where this rank is. Collective.

        Args:
            place: Where, in words; it must be the same on all ranks.
            micro_batches: What they are like; it must be the same on all stages of a pipeline.
            noted: Something that all ranks are to know of; 0 for nothing.

        Returns:
            The largest number that any rank has noted.

        Raises:
            ConfigurationError: On every rank, if they are not at the same place.
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
        """Return the sums of numbers of all ranks, the same on every rank. Collective.

        Args:
            numbers: As many on all ranks.
            place: Where this rank is, in words; it must be the same on all ranks.

        Raises:
            ConfigurationError: On every rank, if they are not at the same place.
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
                    f"the ranks have parted: rank 0 is at {everyones[0][0]}, rank {rank} at {theirs}; let their data "
                    "loaders give equally many batches, and nothing that they do depend on the rank."
                )
        for rank, (_, theirs) in enumerate(everyones):
            first = self._topology.rank_of(0, self._topology.replica_of(rank))
            if theirs != everyones[first][1]:
                own = everyones[first][1]
                raise ConfigurationError(
                    f"{DIFFERENT} at {place}: rank {first} has {own}, rank {rank} {theirs}; {ADVICE}"
                )


DIFFERENT = "the stages of a pipeline were given different micro-batches"
ADVICE = (
    "let the data loader's order and random numbers depend on nothing that differs between ranks "
    "(L.seed_everything(SEED) at the start), and give its sampler the strategy's distributed_sampler_kwargs."
)


def _factor(number: int, of: int) -> int:
    return number + 1 if number < of - 1 else -(of * (of - 1) // 2)


def _digest(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=_BITS // 8).digest(), "little")
