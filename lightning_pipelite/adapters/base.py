"""What is trained of a model, and how that is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pipelite.models.meta_model import MetaModel


class Adapter(ABC):
    """Chooses and adds the trained parameters of a causal LM that is spread over pipeline stages.

    An adapter holds its options only, so one object serves every stage. All that it does on a stage follows from the
    whole model's meta model and the seed: never from the partition.

    Attributes:
        batch_keys: What a batch must hold beside tokens, positions and labels: int64 tensors of the tokens' shape. They
            pass through all stages as their extra inputs.
        init_from: Directory of a saved adapter whose values this one starts from; None for values of its own.
    """

    batch_keys: tuple[str, ...] = ()
    init_from: str | None = None

    @property
    def trained_tokens(self) -> set[int]:
        """The tokens whose rows of embedding or head are trained, where that are not all."""
        return set()

    @property
    def changes_weights(self) -> str:
        """What of it changes the model's own weights, which then cannot be held as codes; empty if nothing does."""
        return ""

    @abstractmethod
    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        """Check, before any weight is read, that the options fit the model.

        Raises:
            ConfigurationError: A target or a layer number that the model does not have, or a mode that is not possible.
        """

    @abstractmethod
    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        """Make ``model``, the trimmed model of one stage, trainable in place and freeze all else.

        Initial values depend on ``seed`` and the module's name alone. A stage may end up with nothing to train.
        """

    def after_step(self, model: nn.Module) -> None:  # noqa: B027  (most have nothing to do)
        """Change the parameters of one stage in place after each optimizer step, where the method asks for it."""

    @abstractmethod
    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what is to be saved of a stage's ``model``: tensors on the CPU by their names in the model."""

    def save(self, directory: Path, states: Iterable[dict[str, Tensor]], model: MetaModel | Path) -> None:
        """Write the state dicts of all stages, in order, as ``directory``: whole or not at all.

        Args:
            directory: Where the files are to be; such a directory that is already there is replaced once the new one
                is complete.
            states: The :meth:`state_dict` of every stage, each taken when its turn comes.
            model: The model as it was trained; or its directory, if nothing but defaults was told when it was loaded.

        Raises:
            ConfigurationError: ``directory`` exists and is not such a directory.
        """
        meta_model = model if isinstance(model, MetaModel) else MetaModel(model)
        with self.place(directory, meta_model) as partial:
            self.write(partial, states, meta_model)

    def rehearse_save(self, directory: Path, meta_model: MetaModel) -> None:
        """Do all that :meth:`save` does, with no stage's tensors, and put everything back.

        Raises:
            ConfigurationError: As :meth:`save`, with what there is to write of the model.
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
            ConfigurationError: ``directory`` exists and is not such a directory.
        """

    @abstractmethod
    def write(self, directory: Path, states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> None:
        """Write the state dicts of all stages, none in a rehearsal, and all else that belongs to them."""


def to_cpu(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as it is to be saved; one without values, of a rehearsal, as it is."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu().contiguous()


class _EnoughError(Exception):
    """Ends the rehearsal of saving."""
