"""What a causal LM's layers ask of what is trained of them; ``lightning_pipelite.adapters`` has classes that answer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from lightning_pipelite.models.meta_model import MetaModel


class Trains(Protocol):
    """Chooses and adds the trained parameters: see :class:`~lightning_pipelite.adapters.base.Adapter`."""

    batch_keys: tuple[str, ...]

    @property
    def changes_weights(self) -> str:
        """What of it changes the model's own weights; empty if nothing does."""
        ...

    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        """Check, before any weight is read, that the options fit the model."""
        ...

    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        """Make the trimmed model of one stage trainable in place and freeze all else."""
        ...

    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what is to be saved of a stage's model."""
        ...
