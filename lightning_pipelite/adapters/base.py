"""The base class of adapters: which parameters of a model are trained, and how they are saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pipelite.models.meta_model import MetaModel


class Adapter(ABC):
    """Chooses and adds the trained parameters of a causal LM that is split into pipeline stages.

    An adapter holds only its options, so one object serves every stage. Everything that it does on a stage follows from
    the whole model's meta model and the seed, never from the partition.

    Attributes:
        batch_keys: What a batch must hold besides tokens, positions and labels: int64 tensors of the tokens' shape.
            They pass through all stages as extra inputs.
        init_from: Directory of a saved adapter whose values this one starts from; None for fresh initial values.
    """

    batch_keys: tuple[str, ...] = ()
    init_from: str | None = None

    @property
    def trained_tokens(self) -> set[int]:
        """The tokens whose rows of the embedding or head are trained, where not all rows are."""
        return set()

    @property
    def changes_weights(self) -> str:
        """The option that changes the model's own weights, which then cannot be quantised; empty if none does."""
        return ""

    @abstractmethod
    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        """Check, before any weight is read, that the options fit the model.

        Raises:
            ConfigurationError: The model lacks a target or a layer number, or does not support a mode.
        """

    @abstractmethod
    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        """Make ``model``, the trimmed model of one stage, trainable in place and freeze everything else.

        Initial values depend only on ``seed`` and the module's name. A stage may end up with nothing to train.
        """

    def after_step(self, model: nn.Module) -> None:  # noqa: B027  (most have nothing to do)
        """Change the parameters of one stage in place after each optimizer step, if the method requires it."""

    @abstractmethod
    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what is to be saved of a stage's ``model``: CPU tensors by their names in the model."""

    def save(self, directory: Path, states: Iterable[dict[str, Tensor]], model: MetaModel | Path) -> None:
        """Write the state dicts of all stages, in order, to ``directory``: all or nothing.

        Args:
            directory: Where to save; an existing directory of this kind is replaced once the new one is complete.
            states: The :meth:`state_dict` of every stage, consumed one at a time.
            model: The model as it was trained; or its directory, if it was loaded with defaults only.

        Raises:
            ConfigurationError: ``directory`` exists and is of another kind.
        """
        meta_model = model if isinstance(model, MetaModel) else MetaModel(model)
        with self.place(directory, meta_model) as partial:
            self.write(partial, states, meta_model)

    def rehearse_save(self, directory: Path, meta_model: MetaModel) -> None:
        """Do everything that :meth:`save` does, without any stage's tensors, and undo it.

        Raises:
            ConfigurationError: As in :meth:`save`, including for what is written besides tensors.
        """
        try:
            with self.place(directory, meta_model) as partial:
                self.write(partial, [], meta_model)
                raise _EnoughError
        except _EnoughError:
            pass

    @abstractmethod
    def place(self, directory: Path, meta_model: MetaModel) -> AbstractContextManager[Path]:
        """Yield an empty directory that replaces ``directory`` once it is complete.

        Raises:
            ConfigurationError: ``directory`` exists and is of another kind.
        """

    @abstractmethod
    def write(self, directory: Path, states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> None:
        """Write the state dicts of all stages, none in a rehearsal, and everything else that belongs with them."""


def to_cpu(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as it is to be saved, on the CPU; a meta tensor, as in a rehearsal, is left as it is."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu().contiguous()


class _EnoughError(Exception):
    """Ends the rehearsal of saving."""
