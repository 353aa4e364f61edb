"""What a training that begins anew would write over."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_pipelite.errors import ConfigurationError


def refuse_former_result(trainer: pl.Trainer, sentence: str | None) -> None:
    """Refuse it as training starts, under any strategy; PipeLiteStrategy has refused it before. Collective.

    Args:
        trainer: As training starts.
        sentence: About the result of another training, if there is one; rank 0's counts.

    Raises:
        ConfigurationError: On every rank, if this training begins anew.
    """
    goes_on = trainer.ckpt_path is not None or trainer.global_step > 0
    if goes_on or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if refusal := trainer.strategy.broadcast(sentence):
        raise ConfigurationError(refusal)
