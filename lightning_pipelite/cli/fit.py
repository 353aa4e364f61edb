"""``pipelite fit`` and ``pipelite validate``: LightningCLI, with everything checked before any process starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from lightning_pipelite.callbacks import SaveTrained, StageTimes, StepProgress
from lightning_pipelite.checkpoint.find import require_last
from lightning_pipelite.checkpoint.manifest import read_manifest
from lightning_pipelite.checkpoint.named import refuse_best
from lightning_pipelite.checkpoint.reader import located
from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.error_messages import ENV_PREFIX, explain
from lightning_pipelite.cli.fit_options import ConfiguredCLI
from lightning_pipelite.cli.next_steps import next_steps
from lightning_pipelite.cli.trainer_options import ACCELERATORS, check_trainer_options
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import MayOverwrite
from lightning_pipelite.shared.verbosity import OPTION, say_warnings_plainly
from lightning_pipelite.strategy import PipeLiteStrategy
from lightning_pipelite.strategy.checks import check_options
from lightning_pipelite.strategy.former_results import refuse_former_results

DESCRIPTION = f"""Pipeline-parallel fine-tuning of Hugging Face causal LMs. Environment variables such as
{ENV_PREFIX}_FIT__TRAINER__MAX_STEPS=3 override defaults. The command line, including --config FILE, overrides both; its
later options override earlier ones. {OPTION} prints all messages of the libraries. Other commands: \
{"; ".join(f"{name} ({command.summary[:-1]})" for name, command in COMMANDS.items())}."""


class TrainerCLI(ConfiguredCLI):
    """Parses ``sys.argv``, checks the options and runs the Trainer.

    Raises:
        ConfigurationError: If anything is wrong that can be detected before training.
        MisconfigurationException: Lightning's equivalent.
    """

    def __init__(self) -> None:
        say_warnings_plainly()
        super().__init__(DESCRIPTION)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path == "best":
            refuse_best()
        if path not in (None, "last", "hpc"):
            read_manifest(located(Path(path)))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init[self.subcommand].trainer
        if options.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigurationError(
                f"trainer.accelerator is {options.accelerator} but torch finds no GPU here; set it to cpu, or fix the "
                "driver (nvidia-smi must list the GPU)."
            )
        strategies = [name for name, each in StrategyRegistry.items() if issubclass(each["strategy"], PipeLiteStrategy)]
        known = {*ACCELERATORS, *AcceleratorRegistry.available_accelerators()}
        check_trainer_options(vars(options), strategies, known)
        given = options.callbacks or []
        given = given if isinstance(given, list) else [given]
        if self.subcommand == "fit" and self.config_init.fit.overwrite:
            for callback in given:
                if isinstance(callback, MayOverwrite):
                    callback.overwrite = True
        if not options.barebones:
            shows_progress = options.enable_progress_bar is not False
            options.callbacks = [*self._missing(given, shows_progress=shows_progress), *given]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise ConfigurationError(f"trainer: {error}") from error

    @staticmethod
    def _missing(given: list[Callback], *, shows_progress: bool) -> list[Callback]:
        """Return the callbacks that every run has, unless the user has given others of their kind."""
        missing: list[Callback] = []
        if shows_progress and not any(isinstance(callback, ProgressBar) for callback in given):
            missing.append(StepProgress())
        if not any(isinstance(callback, StageTimes) for callback in given):
            missing.append(StageTimes())
        return missing

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's for a union of types, which hides the class's own error
            if "Union subtypes" not in str(error):
                raise
            raise ConfigurationError(explain(str(error), self._subcommand_parsers)) from error
        model, data = self.model, self.datamodule
        model._log_hyperparams = data._log_hyperparams = False  # SaveConfig logs all sections
        strategy = model.check_strategy(self.trainer.strategy)
        check_options(self.trainer, model)
        _check_environment_of(strategy)
        _check_loggers(self.trainer)
        # Only the processes that train find the costs of the layers, which auto needs.
        strategy.cutter("uniform" if strategy.partition_method == "auto" else None)(model.pipeline_layers()[0])
        if self.config_init[self.subcommand].ckpt_path == "last":
            require_last(self.trainer)
        if self.subcommand == "fit" and self.trainer.is_global_zero:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SaveTrained):
                    callback.check(model)
            refuse_former_results(self.trainer, self.config_init.fit.ckpt_path)
        data.prepare_data()  # tokenises and packs what is not in the cache yet
        model.check_data(data)
        if self.subcommand == "fit":
            data.check(strategy.topology.replicas, self.trainer.accumulate_grad_batches)
        elif not data.statistics.eval.sequences:
            raise ConfigurationError(
                "there is no data to validate on: set data.eval_fraction above 0, or list data.eval_datasets."
            )
        if self.trainer.is_global_zero:
            print("\n".join(data.summary()), flush=True)

    def after_fit(self) -> None:
        """Print what to do next; LightningCLI calls this after successful training."""
        if not self.trainer.is_global_zero:
            return
        options, data = self.config.fit, self.datamodule
        base = ["--model_dir", options.model.model_dir]
        base += ["--trust_remote_code"] * options.model.trust_remote_code
        template = options.data.chat_template
        asks = ["--chat_template", template] if template else ["--chat"]
        print("\n".join(next_steps(self.trainer, base, asks if data.has_conversations else [])), flush=True)


def _check_environment_of(strategy: PipeLiteStrategy) -> None:
    """Refuse what Lightning and torch would refuse only at the rendezvous."""
    backend = strategy._process_group_backend
    if backend is not None and backend not in dist.Backend.backend_list:
        names = ", ".join(name for name in dist.Backend.backend_list if name != dist.Backend.UNDEFINED)
        raise ConfigurationError(f"strategy: process_group_backend is {backend!r}; choose one of {names}.")
    assert strategy.cluster_environment is not None
    try:
        strategy.cluster_environment.validate_settings(strategy.num_processes, strategy.num_nodes)
    except ValueError as error:
        raise ConfigurationError(f"trainer: {error}") from error


def _check_loggers(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if logger.save_dir and "://" not in logger.save_dir:
            directory = Path(logger.save_dir).absolute()
            place = next(path for path in (directory, *directory.parents) if path.exists())
            if not (place.is_dir() and os.access(place, os.W_OK)):
                raise ConfigurationError(
                    f"trainer.logger: {type(logger).__name__} cannot write to {logger.save_dir}; set its save_dir to a "
                    "writable directory."
                )
