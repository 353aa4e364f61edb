"""What training steps and evaluations run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy.agreement import Agreement
from lightning_pipelite.strategy.layers import LooseParts
from lightning_pipelite.strategy.micro_batches import MicroBatch, all_shapes

if TYPE_CHECKING:
    from lightning_pipelite.strategy.engine import PipeLiteEngine


@dataclass(frozen=True)
class Pipeline:
    """The engine, and what belongs to it on each rank.

    Attributes:
        trainer: Runs the loop, and has the module that logs.
        engine: Runs the micro-batches.
        agreement: The agreement of all ranks.
        topology: The topology of the job.
        loose_parts: The loose parts of this rank's stage.
    """

    trainer: pl.Trainer
    engine: PipeLiteEngine
    agreement: Agreement
    topology: Topology
    loose_parts: LooseParts

    def agree(self, place: str, micro_batches: Sequence[MicroBatch]) -> None:
        """Raise if stages have different micro-batches, or not as many, and so would wait forever. Collective.

        Args:
            place: Where this rank is, in words.
            micro_batches: What it is about to run.

        Raises:
            ConfigurationError: On every rank.
        """
        if self.topology.stages > 1:
            self.agreement.tell(place, all_shapes(micro_batches))
