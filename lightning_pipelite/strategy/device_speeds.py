"""The relative speeds of the devices, as given to the strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology


def parse_speeds(text: str) -> tuple[float, ...]:
    """Parse speeds such as ``1,1,0.5``.

    Raises:
        ConfigurationError: If they are not positive numbers.
    """
    try:
        return _checked([float(each) for each in text.split(",")])
    except ValueError:
        return _checked(text)


def _checked(speeds: Any) -> tuple[float, ...]:
    numbers = isinstance(speeds, (list, tuple)) and all(isinstance(speed, (int, float)) for speed in speeds)
    if not numbers or not speeds or not all(0 < speed < math.inf for speed in speeds):
        raise ConfigurationError(f"speeds is {speeds!r}; give a positive number for each device, as in 1,1,0.5.")
    return tuple(speeds)


def check_speeds(speeds: Sequence[float] | None, partition_method: str) -> None:
    """Refuse speeds that are invalid, or that nothing would use.

    Raises:
        ConfigurationError: If they are not positive numbers, or if ``partition_method`` is not ``auto``.
    """
    if speeds is None:
        return
    _checked(speeds)
    if partition_method != "auto":
        raise ConfigurationError(
            f"strategy: speeds are given, but partition_method is {partition_method}; set it to auto, the only method "
            "that uses them, or leave speeds out."
        )


def speeds_of_stages(speeds: Sequence[float] | None, topology: Topology) -> list[float]:
    """Return the speed of each stage's slowest device, relative to the fastest stage; empty if none are given.

    Args:
        speeds: Speeds of the devices, in the order of their ranks.
        topology: The job's topology.

    Raises:
        ConfigurationError: If there is not one speed for each device.
    """
    if speeds is None:
        return []
    if len(speeds) != topology.world_size:
        raise ConfigurationError(
            f"strategy: the number of speeds is {len(speeds)}, but the job has {topology.world_size} devices; give one "
            "speed per device, in the order of their ranks."
        )
    least = topology.least_of_stages(speeds)
    return [speed / max(least) for speed in least]
