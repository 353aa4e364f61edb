"""Saves the configuration of a run in its checkpoints and logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

COMPARED = ("eval/loss", "train/loss")
"""Metrics that TensorBoard's page of hyper-parameters shows with them."""


class SaveConfig(SaveConfigCallback):
    """Saves the configuration in every checkpoint, and next to the logs, where it overwrites no file.

    Without a logger it writes no file: the log directory is then the working directory, and a config.yaml there may
    well be the user's own. Each logger receives as hyper-parameters all options of the model, such as
    ``model.adapter`` and ``model.adapter.rank``, and the other options that differ from their defaults; TensorBoard
    also receives the whole file as text.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.logger is None:
            return
        directory = Path(trainer.log_dir or ".")  # on every rank, as it is broadcast
        number = 1
        while trainer.is_global_zero and (directory / self.config_filename).exists():
            number += 1
            self.config_filename = f"config-{number}.yaml"
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        usual = dict(hyper_parameters(self.parser.get_defaults().as_dict()))
        given = dict(hyper_parameters(self._configuration()))
        chosen = {name: value for name, value in given.items() if name.startswith("model.") or usual.get(name) != value}
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(chosen)
                continue
            logger.log_hyperparams(chosen, metrics={})  # to its file only; a metric would be drawn as a curve
            for summary in hparams(chosen, dict.fromkeys(COMPARED, 0.0)):
                logger.experiment._get_file_writer().add_summary(summary)
            logger.experiment.add_text("configuration", f"```yaml\n{self._text()}```")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["configuration"] = self._configuration()

    def _text(self) -> str:
        return self.parser.dump(self.config, skip_none=False)

    def _configuration(self) -> dict[str, Any]:
        return yaml.safe_load(self._text())


def hyper_parameters(options: Any, name: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Yield the dotted names and values of the options that have one; a class has the name of its option.

    Args:
        options: A configuration: nested dicts and lists.
        name: The dotted name of ``options`` themselves.
    """
    if isinstance(options, dict):
        for key, value in options.items():
            inner = f"{name}.{key}" if name else key
            if inner in ("trainer.callbacks", "trainer.logger", "config"):
                continue
            if key == "class_path":
                yield name, str(value).rpartition(".")[2]
            else:
                yield from hyper_parameters(value, name if key == "init_args" else inner)
    elif isinstance(options, list):
        for number, value in enumerate(options):
            yield from hyper_parameters(value, f"{name}.{number}")
    elif options is not None:
        yield name, options
