"""How fast the devices are, as the strategy is told."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology


def check_speeds(speeds: Sequence[float] | None, partition_method: str) -> None:
    """Refuse speeds that are none, or that nothing would use.

    Raises:
        ConfigurationError: For these.
    """
    if speeds is None:
        return
    numbers = isinstance(speeds, Sequence) and all(isinstance(speed, (int, float)) for speed in speeds)
    if not numbers or not speeds or not all(0 < speed < math.inf for speed in speeds):
        raise ConfigurationError(f"strategy: speeds is {speeds}; give a positive number for each device.")
    if partition_method != "auto":
        raise ConfigurationError(
            f"strategy: speeds are given, but partition_method is {partition_method}; set it to auto, which alone uses "
            "them, or leave speeds out."
        )


def speeds_of_stages(speeds: Sequence[float] | None, topology: Topology) -> list[float]:
    """Return the speed of each stage's slowest device, relative to the fastest stage; empty if none are given.

    Args:
        speeds: Of the devices, in the order of their ranks.
        topology: Which rank is which stage.

    Raises:
        ConfigurationError: If there is not one for each device.
    """
    if speeds is None:
        return []
    if len(speeds) != topology.world_size:
        raise ConfigurationError(
            f"strategy: speeds has {len(speeds)} numbers, and the job {topology.world_size} devices; give one for "
            "each, in the order of their ranks."
        )
    least = topology.least_of_stages(speeds)
    return [speed / max(least) for speed in least]
