"""Takes what was trained out of training checkpoints, of this project and of qlora-pipe-lite."""

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
    """Write what a training checkpoint holds as a PEFT directory, or as a whole model if its own weights were trained.

    Args:
        checkpoint: Directory of the checkpoint: one of this project's, or one of qlora-pipe-lite's with its
            layer_NN-model_states.pt files (or the directory of a run, for its latest one).
        output: Directory to write; must not exist, or be empty.
        config: Configuration of the training: a YAML file of pipelite fit, or what it holds, or the TOML of
            qlora-pipe-lite. The model is found where it says. A checkpoint of this project says it all itself, unless
            the model has moved; also whether the model's own code was trusted, which is then run again.
        allow_another_base: Convert though the model is not the one of the training any more.

    Raises:
        ConfigurationError: This is no checkpoint, is damaged, or does not fit the configuration.
    """
    directory = directory_of(checkpoint)
    settings = Path(config) if isinstance(config, str) else config
    if isinstance(settings, Path) and not settings.is_file():
        raise ConfigurationError(f"{config} does not exist; give the configuration of the training.")
    if is_former(directory):
        if not isinstance(settings, Path):
            raise ConfigurationError(f"{checkpoint} is one of qlora-pipe-lite; give its TOML as config.")
        return FormerCheckpoint(directory, settings).convert(Path(output))
    if isinstance(settings, Path):
        settings = read_settings(settings)
    return convert_own(directory, Path(output), settings, allow_another_base=allow_another_base)
