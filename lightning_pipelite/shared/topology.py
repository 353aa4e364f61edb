"""Which rank is which stage of which pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_pipelite.errors import ConfigurationError


@dataclass(frozen=True)
class Topology:
    """The ranks of a job as a grid of pipeline stages and data-parallel replicas.

    Args:
        world_size: The number of processes.
        stages: The number of pipeline stages; it must divide ``world_size``.
        column_major: Neighbouring ranks are the stages of one pipeline (rank = replica x stages + stage), so that
            hidden states stay within a node; otherwise they are the replicas of one stage (rank = stage x replicas +
            replica), so that gradients do.

    Raises:
        ConfigurationError: The number of stages does not divide the number of processes.
    """

    world_size: int
    stages: int
    column_major: bool = False

    def __post_init__(self) -> None:
        if self.stages < 1 or self.world_size % self.stages:
            raise ConfigurationError(
                f"pipeline_stages={self.stages} must divide the number of devices ({self.world_size}); "
                "change pipeline_stages, or devices and num_nodes."
            )

    @property
    def replicas(self) -> int:
        """The data-parallel size: the number of pipelines."""
        return self.world_size // self.stages

    def stage_of(self, rank: int) -> int:
        """Return the stage of a global rank."""
        return rank % self.stages if self.column_major else rank // self.replicas

    def replica_of(self, rank: int) -> int:
        """Return the replica of a global rank."""
        return rank // self.stages if self.column_major else rank % self.replicas

    def rank_of(self, stage: int, replica: int) -> int:
        """Return the global rank of a stage of a replica."""
        return replica * self.stages + stage if self.column_major else stage * self.replicas + replica

    def least_of_stages(self, of_ranks: Sequence[float]) -> list[float]:
        """Return the least of the numbers of each stage's ranks, such as their memory or speed."""
        least = [math.inf] * self.stages
        for rank, number in enumerate(of_ranks):
            least[self.stage_of(rank)] = min(least[self.stage_of(rank)], number)
        return least
