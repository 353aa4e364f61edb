"""The ``pipelite`` command: LightningCLI with this package's module, data and strategy."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning_pipelite import __version__
from lightning_pipelite.errors import ConfigurationError

_ENV_PREFIX = "PIPELITE"
_DESCRIPTION = """Pipeline-parallel fine-tuning of Hugging Face causal LMs. Options come, each over the ones before, from
PIPELITE_FIT__CONFIG (a file), environment variables such as PIPELITE_FIT__TRAINER__MAX_STEPS=3, and the command line in
its order, --config FILE included."""


def main() -> None:
    """Run ``pipelite fit`` or ``pipelite validate``; errors of configuration are one sentence, and exit status 2."""
    if sys.argv[1:] == ["--version"]:  # at once, without ten seconds of imports
        print(f"pipelite {__version__}")
        return
    _quiet()
    try:
        _run()
    except ConfigurationError as error:
        _refuse(str(error))


def _refuse(sentence: str) -> NoReturn:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0:  # the processes that another one started, or a launcher, would all say the same
        print(f"pipelite: error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _quiet() -> None:
    """Leave out what a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers fork after the tokenizer was used
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name, level in (
        ("lightning.pytorch.utilities.rank_zero", logging.WARNING),  # what devices there are, and tips
        ("lightning.fabric.utilities.distributed", logging.WARNING),  # a line for each process that joined
        ("lightning.fabric.utilities.seed", logging.WARNING),  # "Seed set to 0", in every process
        ("bitsandbytes", logging.ERROR),  # kernels that it lacks for CPUs
    ):
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _run() -> None:
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from transformers.utils import logging as transformers_logging

    from lightning_pipelite.cli_parsing import explain
    from lightning_pipelite.data import PackedDataModule
    from lightning_pipelite.lightning_cli import PipeLiteCLI, SaveConfig
    from lightning_pipelite.module import PipeLiteModule

