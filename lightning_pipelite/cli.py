"""The ``pipelite`` command: what it prints, and how it ends."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import NoReturn

from lightning_pipelite import __version__
from lightning_pipelite.errors import ConfigurationError


def main() -> None:
    """Run the command that ``sys.argv`` names; errors of configuration are one sentence, and exit status 2."""
    if sys.argv[1:] == ["--version"]:  # at once, without ten seconds of imports
        print(f"pipelite {__version__}")
        return
    _quiet()
    try:
        _run()
    except ConfigurationError as error:
        _refuse(str(error))


def _quiet() -> None:
    """Leave out what a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers fork after the tokenizer was used
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name, level in (
        ("lightning.pytorch.utilities.rank_zero", logging.WARNING),  # which devices there are, and tips
        ("lightning.fabric.utilities.distributed", logging.WARNING),  # a line for each process that joined
        ("lightning.fabric.utilities.seed", logging.WARNING),  # "Seed set to 0", in every process
        ("bitsandbytes", logging.ERROR),  # kernels that it lacks for CPUs
    ):
        logging.getLogger(name).setLevel(level)
    # Which accelerator it chose. A filter, as DeepSpeed sets the level when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _run() -> None:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from transformers.utils import logging as transformers_logging

    from lightning_pipelite.commands import COMMANDS

    if (name := sys.argv[1] if sys.argv[1:] else "") in COMMANDS:
        COMMANDS[name].run(name, sys.argv[2:])
        return

    from lightning_pipelite.trainer_cli import TrainerCLI

    if rank_zero_only.rank:  # type: ignore[attr-defined]
        transformers_logging.disable_progress_bar()  # one bar tells how far loading is
    try:
        TrainerCLI()
    except MisconfigurationException as error:  # Lightning's ConfigurationError
        raise ConfigurationError(str(error)) from error


def _refuse(sentence: str) -> NoReturn:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    # The processes that another one started, or a launcher, would all say the same.
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(f"pipelite: error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
