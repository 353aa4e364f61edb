"""Logs text that the model generates at each evaluation."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import WritesText


class Samples(Callback):
    """Generates text from some prompts at each evaluation, and logs it to TensorBoard.

    Decoding is greedy, so differences come from training alone. The module must have a method
    ``write_text(prompt, max_new_tokens)``, called on every rank, as PipeLiteModule has.

    Args:
        prompts: The prompts to continue.
        max_new_tokens: Maximum number of tokens to generate, each of which takes a pass through the model.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 40) -> None:
        if not prompts or not all(prompts):
            raise ConfigurationError("Samples: prompts must hold at least one prompt to continue, and no empty ones.")
        if max_new_tokens < 1:
            raise ConfigurationError(f"Samples: max_new_tokens must be at least 1, not {max_new_tokens}.")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, WritesText):
            raise ConfigurationError(
                f"Samples: {type(pl_module).__name__} has no method write_text(prompt, max_new_tokens); add it, or "
                "leave Samples out."
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, WritesText)
        for number, prompt in enumerate(self.prompts):
            text = pl_module.write_text(prompt, self.max_new_tokens)
            for logger in trainer.loggers if trainer.is_global_zero else ():
                if isinstance(logger, TensorBoardLogger):
                    shown = "\n".join(f"    {line}" for line in f"{prompt}⟶{text}".splitlines())  # shown verbatim
                    logger.experiment.add_text(f"samples/{number}", shown, trainer.global_step)
