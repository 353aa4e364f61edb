"""The devices that training is planned for; they may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_pipelite.shared.topology import Topology


@dataclass(frozen=True)
class Devices:
    """Devices in the order of their ranks.

    Attributes:
        memory: Bytes of each device; empty if not known.
        speeds: Speed of each device, in any unit; empty if they are alike.
        count: Number of devices.
        column_major: Whether neighbouring ranks are the stages of one pipeline; the strategy's
            ``use_column_major_topology``.
    """

    count: int
    memory: tuple[int, ...] = ()
    speeds: tuple[float, ...] = ()
    column_major: bool = False

    @classmethod
    def alike(cls, count: int, memory: int | None = None) -> Devices:
        """Create identical devices.

        Args:
            count: Number of devices.
            memory: Bytes of each; None if not known.
        """
        return cls(count, () if memory is None else (memory,) * count)

    def first(self, count: int) -> Devices:
        """Return the first ``count`` of them."""
        return Devices(count, self.memory[:count], self.speeds[:count], self.column_major)

    def without_stage(self, stage: int, stages: int) -> Devices:
        """Return the devices without those of one stage."""
        topology = Topology(self.count, stages, self.column_major)
        kept = [rank for rank in range(self.count) if topology.stage_of(rank) != stage]
        memory, speeds = (tuple(row[rank] for rank in kept) if row else () for row in (self.memory, self.speeds))
        return Devices(len(kept), memory, speeds, self.column_major)  # type: ignore[arg-type]

    def memory_of_stages(self, stages: int) -> tuple[int, ...]:
        """Return the bytes of each stage's smallest device; empty if not known."""
        return tuple(int(size) for size in self._least(self.memory, stages))

    def speed_of_stages(self, stages: int) -> tuple[float, ...]:
        """Return the speed of each stage's slowest device, relative to the fastest device; empty if they are alike."""
        return tuple(speed / max(self.speeds) for speed in self._least(self.speeds, stages))

    def _least(self, of_ranks: Sequence[float], stages: int) -> list[float]:
        if len(set(of_ranks)) < 2:  # all alike, whatever the topology
            return [of_ranks[0]] * stages if of_ranks else []
        return Topology(self.count, stages, self.column_major).least_of_stages(of_ranks)
