"""The interface of what trains a causal LM's layers, implemented by the classes in ``lightning_pipelite.adapters``."""

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
        """The class or option that changes the model's own weights, for messages; empty if none does."""
        ...

    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        """Check, before any weight is read, that the options fit the model."""
        ...

    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        """Make the trimmed model of one stage trainable in place and freeze all else."""
        ...

    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the tensors to save of a stage's model."""
        ...
