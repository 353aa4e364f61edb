"""The ``pipelite`` command: LightningCLI with this package's module, data and strategy."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any, NoReturn

from lightning_pipelite.errors import ConfigurationError


def main() -> None:
    """Run ``pipelite fit`` or ``pipelite validate``; errors of configuration are one sentence, and exit status 2."""
    if sys.argv[1:] == ["--version"]:
        from lightning_pipelite import __version__

        print(f"pipelite {__version__}")
        return
    _quiet()
    try:
        _run()
    except ConfigurationError as error:
        _refuse(str(error))


def _refuse(sentence: str) -> NoReturn:
    # The processes that another one started, or a launcher, would all say the same.
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0:
        print(f"pipelite: error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _quiet() -> None:
    """Leave out what a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers fork after the tokenizer was used
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR if name == "bitsandbytes" else logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _run() -> None:
    from jsonargparse import ActionConfigFile
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from lightning_pipelite.data import PackedDataModule
    from lightning_pipelite.module import PipeLiteModule

    class Parser(LightningArgumentParser):
        """Says what is wrong in one sentence, without a page of usage before it."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
            raise ConfigurationError(_plain(message))

    class CLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            parser = Parser(**kwargs)
            parser.add_argument("-c", "--config", action=ActionConfigFile, help="A YAML or JSON file of these options.")
            return parser

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            commands = LightningCLI.subcommands()
            return {name: commands[name] for name in ("fit", "validate")}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("model.model_dir", "data.tokenizer_dir")

        def instantiate_classes(self) -> None:
            super().instantiate_classes()
            # Before any process is started: tokenise and pack what is not in the cache yet, and look at the result.
            self.datamodule.prepare_data()
            if self.subcommand == "fit":
                strategy, accumulate = self.trainer.strategy, self.trainer.accumulate_grad_batches
                replicas = getattr(strategy, "distributed_sampler_kwargs", {}).get("num_replicas", 1)
                self.datamodule.check(replicas, accumulate)
            if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0:
                print("\n".join(self.datamodule.summary()), flush=True)

    CLI(
        PipeLiteModule,
        PackedDataModule,
        trainer_defaults={"strategy": "pipelite", "enable_model_summary": False},
        save_config_kwargs={"overwrite": True},
    )


def _plain(message: str) -> str:
    """jsonargparse's message in one line."""
    return " ".join(line.strip(" -") for line in message.splitlines() if line.strip())
