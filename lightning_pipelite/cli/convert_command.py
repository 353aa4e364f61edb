"""``pipelite convert``: converts a training checkpoint to an adapter or a model."""

from __future__ import annotations

from pathlib import Path

from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import conversion
from lightning_pipelite.export.checkpoint_place import is_former


def convert(
    checkpoint: str, output: str, config: str | Configuration | None = None, allow_another_base: bool = False
) -> str:
    """Convert a training checkpoint to a PEFT directory, or to a whole model if the model's own weights were trained.

    Args:
        checkpoint: Directory of the checkpoint: this project's, or qlora-pipe-lite's with its layer_NN-model_states.pt
            files (or the directory of a run, for its latest checkpoint).
        output: Directory to write; must be empty or not exist.
        config: Configuration of the training: that of pipelite fit, or the TOML of qlora-pipe-lite. It says where the
            model is. A checkpoint of this project records all of this, so it needs none unless the model has moved; if
            the model's own code was trusted in training, it is run again.
        allow_another_base: Convert even if the model is no longer the one that was trained on.

    Raises:
        ConfigurationError: This is not a checkpoint, is damaged, or does not fit the configuration.
    """
    if config is None or not Path(checkpoint).is_dir():
        return conversion.convert(checkpoint, output, allow_another_base=allow_another_base)
    given = Configuration.of(config)
    for file in given.files:
        if not Path(file).is_file():
            raise ConfigurationError(f"{file} does not exist; give the configuration used for training.")
    if not is_former(Path(checkpoint)):
        return conversion.convert(checkpoint, output, given.read(), allow_another_base)
    if given.words != ("--config", *given.files):
        raise ConfigurationError(
            f"{checkpoint} is a checkpoint of qlora-pipe-lite; give the TOML of its training as config, "
            "and no other option."
        )
    return conversion.convert(checkpoint, output, given.files[0], allow_another_base)
