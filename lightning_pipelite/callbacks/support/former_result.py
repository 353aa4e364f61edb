"""Refuses to overwrite the result of another training."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_pipelite.errors import ConfigurationError


def refuse_former_result(trainer: pl.Trainer, sentence: str | None) -> None:
    """Refuse to overwrite an earlier result, under any strategy; PipeLiteStrategy does so even earlier. Collective.

    Args:
        trainer: The Trainer, as training starts.
        sentence: Message about the result of another training, if there is one; rank 0's counts.

    Raises:
        ConfigurationError: On every rank, if there is such a result and this training starts from scratch.
    """
    goes_on = trainer.ckpt_path is not None or trainer.global_step > 0
    if goes_on or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if refusal := trainer.strategy.broadcast(sentence):
        raise ConfigurationError(refusal)
