"""Makes Lightning itself read checkpoint directories that the strategy has written.

Lightning passes every path to ``torch.load``, both in ``load_from_checkpoint`` and for ``ckpt_path`` under any other
strategy. Neither place has a hook that works without the module or the strategy opting in. So three of Lightning's
functions are replaced when the strategy or :func:`~lightning_pipelite.strategy.load_trained` is imported; for all other
paths and states they behave as before. Remove each when Lightning asks the checkpoint, not the running strategy, how it
is read.

* ``pl_load`` in ``lightning.pytorch.core.saving``, with which ``load_from_checkpoint`` reads,
* ``_CheckpointConnector.resume_start``, which reads ``ckpt_path``; under other strategies this works for evaluation, if
  they load a module's own ``state_dict``,
* ``LightningModule.load_state_dict``, because a stage is saved under the names of its layers, and holds only trained
  parameters and buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core import saving
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from lightning_pipelite.checkpoint.encoding import decode
from lightning_pipelite.checkpoint.layout import BUFFER, PARAMETER
from lightning_pipelite.checkpoint.reader import check_whole, is_checkpoint, located, stage_tensors, trainer_state
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import TimesStages
from lightning_pipelite.strategy.trained import load_state

_load, _resume_start = saving.pl_load, _CheckpointConnector.resume_start


class StagesState(dict[str, Tensor]):
    """The ``state_dict`` of a checkpoint in stages, under the names used there.

    Args:
        directory: The checkpoint, known to be complete.
        meta: The content of its ``meta.json``.
        outside: The module's tensors that are in no stage.
    """

    def __init__(self, directory: Path, meta: dict[str, Any], outside: dict[str, Tensor]) -> None:
        saved = stage_tensors(directory, meta["stages"], lambda key: key.startswith((PARAMETER, BUFFER)))
        super().__init__({**{key.split("/", 1)[1]: tensor for key, tensor in saved}, **outside})
        self.directory, self.meta, self.outside = directory, meta, outside


def install() -> None:
    """Replace the three functions; calling it again changes nothing."""
    saving.pl_load = load
    _CheckpointConnector.resume_start = resume_start  # type: ignore[method-assign, assignment]
    pl.LightningModule.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]


def load(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Return the same dict for either kind of checkpoint; replaces ``torch.load``."""
    if not _is_ours(path_or_url):
        return _load(path_or_url, map_location=map_location, weights_only=weights_only)
    checkpoint = _as_lightnings(path_or_url)
    if isinstance(map_location, (str, torch.device)):  # Lightning puts the module where the first tensor is
        state = checkpoint["state_dict"]
        state.update({name: tensor.to(map_location) for name, tensor in state.items()})
    return checkpoint


def resume_start(
    connector: _CheckpointConnector, checkpoint_path: Any = None, weights_only: bool | None = None
) -> None:
    """Read either kind of checkpoint; Lightning's own leaves that to the running strategy."""
    trainer, strategy = connector.trainer, connector.trainer.strategy
    if isinstance(strategy, TimesStages) or not _is_ours(checkpoint_path):
        _resume_start(connector, checkpoint_path, weights_only=weights_only)
        return
    evaluates = trainer.state.fn != TrainerFn.FITTING
    if not evaluates or type(strategy).load_model_state_dict is not Strategy.load_model_state_dict:
        raise ConfigurationError(
            f"ckpt_path: {checkpoint_path} was written by PipeLiteStrategy, and {type(strategy).__name__} cannot "
            "resume from its stages: resume under PipeLiteStrategy, or leave ckpt_path out and load the trained "
            f"weights into the module with lightning_pipelite.strategy.load_trained(module, {str(checkpoint_path)!r})."
        )
    connector._ckpt_path = checkpoint_path
    connector._loaded_checkpoint = _as_lightnings(checkpoint_path)


def load_state_dict(module: pl.LightningModule, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """Load either kind of state; the base class's method knows only the module's own names."""
    if not isinstance(state_dict, StagesState):
        return super(pl.LightningModule, module).load_state_dict(state_dict, *args, **kwargs)
    strict = args[0] if args else kwargs.get("strict", True)
    load_state(module, state_dict.directory, state_dict.meta, state_dict.outside, strict)
    return _IncompatibleKeys([], [])


def _is_ours(path: Any) -> bool:
    return isinstance(path, (str, Path)) and "://" not in str(path) and is_checkpoint(located(Path(path)))


def _as_lightnings(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint in the form in which ``torch.load`` returns those of other strategies.

    Raises:
        ConfigurationError: If it is incomplete.
    """
    directory = located(Path(path))
    meta = check_whole(directory)
    state: dict[str, Any] = decode(*trainer_state(directory))
    return {**state, "state_dict": StagesState(directory, meta, state.get("state_dict", {}))}
