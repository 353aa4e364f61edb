"""Extracts what was trained from training checkpoints of this project and of qlora-pipe-lite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.checkpoint_place import directory_of, is_former
from lightning_pipelite.export.from_checkpoint import convert_own, read_settings
from lightning_pipelite.export.from_qlora_pipe_lite import FormerCheckpoint


def convert(
    checkpoint: str, output: str, config: str | Mapping[str, Any] | None = None, allow_another_base: bool = False
) -> str:
    """Convert a training checkpoint to a PEFT directory, or to a whole model if the model's own weights were trained.

    Args:
        checkpoint: Directory of the checkpoint: this project's, or qlora-pipe-lite's with its layer_NN-model_states.pt
            files (or the directory of a run, for its latest checkpoint).
        output: Directory to write; must be empty or not exist.
        config: Configuration of the training: a YAML file of pipelite fit or its content, or the TOML of
            qlora-pipe-lite. It says where the model is. A checkpoint of this project records all of this, so it needs
            none unless the model has moved; if the model's own code was trusted in training, it is run again.
        allow_another_base: Convert even if the model is no longer the one that was trained on.

    Raises:
        ConfigurationError: This is not a checkpoint, is damaged, or does not fit the configuration.
    """
    directory = directory_of(checkpoint)
    settings = Path(config) if isinstance(config, str) else config
    if isinstance(settings, Path) and not settings.is_file():
        raise ConfigurationError(f"{config} does not exist; give the configuration used for training.")
    if is_former(directory):
        if not isinstance(settings, Path):
            raise ConfigurationError(
                f"{checkpoint} is a checkpoint of qlora-pipe-lite; give the TOML of its training as config."
            )
        return FormerCheckpoint(directory, settings).convert(Path(output))
    if isinstance(settings, Path):
        settings = read_settings(settings)
    return convert_own(directory, Path(output), settings, allow_another_base=allow_another_base)
