"""Library output that a user can do nothing about, and how to see it anyway."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

OPTION, VARIABLE = "--verbose", "PIPELITE_VERBOSE"
PACKAGE = Path(__file__).parents[1]


def is_verbose() -> bool:
    """Tell whether everything is to be printed, by the environment variable."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def take_option() -> None:
    """Take ``--verbose`` off the command line, wherever it is, and set the variable, which child processes inherit."""
    if OPTION in sys.argv:
        sys.argv = [argument for argument in sys.argv if argument != OPTION]
        os.environ[VARIABLE] = "1"


def say_warnings_plainly() -> None:
    """Show this package's warnings without their place in its code; to be called after Lightning is imported.

    With ``--verbose`` the place is shown.
    """
    former = warnings.formatwarning  # Lightning's own, which shows the place
    if is_verbose() or getattr(former, "is_plain", False):
        return

    def plainly(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        own = PACKAGE in Path(filename).parents
        return f"warning: {message}\n" if own else former(message, category, filename, lineno, line)

    plainly.is_plain = True  # type: ignore[attr-defined]
    warnings.formatwarning = plainly


def be_quiet() -> None:
    """Suppress what a user can do nothing about, unless verbose; to be called before libraries are imported."""
    if is_verbose():
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it warns of is checked, and refused, here
    for name, level in (
        ("lightning.pytorch.utilities.rank_zero", logging.WARNING),  # which devices there are, and tips
        ("lightning.fabric.utilities.distributed", logging.WARNING),  # a line for each process that joined
        ("lightning.fabric.utilities.seed", logging.WARNING),  # "Seed set to 0", in every process
        ("lightning.pytorch.accelerators.cuda", logging.WARNING),  # which GPUs a process sees
        ("bitsandbytes", logging.ERROR),  # kernels that it lacks for CPUs
    ):
        logging.getLogger(name).setLevel(level)
    # The accelerator that it chose. A filter, as DeepSpeed sets the level when it is imported: by the strategy, or
    # earlier by accelerate, when transformers saves a model.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # too little data to hold any out: summary()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # PEFT uses transformers' former name while it loads an adapter.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")
