"""``pipelite convert``: what a training checkpoint holds, as an adapter or a model."""

from __future__ import annotations

from pathlib import Path

from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import conversion
from lightning_pipelite.export.checkpoint_place import is_former


def convert(
    checkpoint: str, output: str, config: str | Configuration | None = None, allow_another_base: bool = False
) -> str:
    """Write what a training checkpoint holds as a PEFT directory, or as a whole model if its own weights were trained.

    Args:
        checkpoint: Directory of the checkpoint: one of this project's, or one of qlora-pipe-lite's with its
            layer_NN-model_states.pt files (or the directory of a run, for its latest one).
        output: Directory to write; must not exist, or be empty.
        config: Configuration of the training: that of pipelite fit, or the TOML of qlora-pipe-lite. The model is found
            where it says. A checkpoint of this project says it all itself, unless the model has moved; also whether the
            model's own code was trusted, which is then run again.
        allow_another_base: Convert though the model is not the one of the training any more.

    Raises:
        ConfigurationError: This is no checkpoint, is damaged, or does not fit the configuration.
    """
    if config is None or not Path(checkpoint).is_dir():
        return conversion.convert(checkpoint, output, allow_another_base=allow_another_base)
    given = Configuration.of(config)
    for file in given.files:
        if not Path(file).is_file():
            raise ConfigurationError(f"{file} does not exist; give the configuration of the training.")
    if not is_former(Path(checkpoint)):
        return conversion.convert(checkpoint, output, given.read(), allow_another_base)
    if given.words != ("--config", *given.files):
        raise ConfigurationError(f"{checkpoint} is one of qlora-pipe-lite; give its TOML as config, and no more.")
    return conversion.convert(checkpoint, output, given.files[0], allow_another_base)
