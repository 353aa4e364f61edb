"""The ``pipelite`` command: what it prints, and its exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import signal
import sys
from typing import NoReturn

from lightning_pipelite import __version__
from lightning_pipelite.cli.early import check_all_there, check_command, check_early
from lightning_pipelite.cli.early_data import check_data
from lightning_pipelite.cli.early_values import check_values
from lightning_pipelite.cli.fast_exit import end_at_once, short_lived, without_collection
from lightning_pipelite.cli.help import HELP_ALL, overview, short_help
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.verbosity import be_quiet, take_option
from lightning_pipelite.strategy.watchdog.parent_death import guard_against_parent_death

INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C, by shell convention."""


def main() -> None:
    """Run the command that ``sys.argv`` names; report configuration errors in one sentence, with exit status 2.

    With ``--verbose``, or ``PIPELITE_VERBOSE=1`` in the environment, all messages of the libraries are printed.
    """
    if sys.argv[1:] == ["--version"]:  # at once, without ten seconds of imports
        print(f"pipelite {__version__}")
        return
    take_option()
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(overview())
        return
    _before_imports(sys.argv[1], sys.argv[2:])
    guard_against_parent_death()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer has been used
    be_quiet()
    try:
        with short_lived() if _plans() else contextlib.nullcontext():
            _run()
    except ConfigurationError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # how Lightning ends after Ctrl-C
            _interrupted()
        raise


def _before_imports(command: str, words: list[str]) -> None:
    """Answer at once what can be answered without slow imports."""
    from lightning_pipelite.cli.base_name import with_own_names
    from lightning_pipelite.cli.commands import COMMANDS
    from lightning_pipelite.cli.early_commands import check_command_values
    from lightning_pipelite.cli.error_messages import explain

    try:
        if command in _RUNS or command in COMMANDS:
            words = with_own_names(command, words)
            sys.argv[2:] = words
        if command in _RUNS:
            if "--help" in words or "-h" in words:
                print(short_help(command))
                sys.exit(0)
            if HELP_ALL not in words:
                check_early(words)
                check_all_there(words)
                check_data(words)
                check_values(words, trains=command == "fit")
            sys.argv = ["--help" if word == HELP_ALL else word for word in sys.argv]
        elif command in COMMANDS:
            check_command(command, COMMANDS[command], words)
            check_command_values(command, COMMANDS[command], words)
            if command == "preview" and "--help" not in words:
                check_data(words)
        elif not command.startswith("-"):
            near = difflib.get_close_matches(command, [*_RUNS, *COMMANDS], 1, cutoff=0.6)
            if near:
                raise ConfigurationError(f"{command} is not a command; did you mean pipelite {near[0]}?")
            none = argparse.ArgumentParser()
            message = f"argument subcommand: invalid choice: '{command}'"
            raise ConfigurationError(explain(message, dict.fromkeys(_RUNS, none)))
    except ConfigurationError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others would all print the same
            print(f"pipelite: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


_RUNS: tuple[str, ...] = ("fit", "validate")


def start() -> None:
    """Run :func:`main` as the entry point of the process."""
    main()
    if _plans():
        end_at_once()


def _plans() -> bool:
    return sys.argv[1:2] == ["plan"]


def _run() -> None:
    from transformers.utils import logging as transformers_logging

    from lightning_pipelite.cli.commands import COMMANDS
    from lightning_pipelite.shared.progress import from_tqdm

    transformers_logging.set_tqdm_hook(from_tqdm)
    if (name := sys.argv[1] if sys.argv[1:] else "") in COMMANDS:
        COMMANDS[name].run(name, sys.argv[2:])
        return

    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with without_collection():
        from lightning_pipelite.cli.fit import TrainerCLI

    try:
        TrainerCLI()
    except MisconfigurationException as error:  # Lightning's ConfigurationError
        raise ConfigurationError(str(error)) from error


def _refuse(sentence: str) -> NoReturn:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    # Processes started by another one or by a launcher would all print the same.
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(f"pipelite: error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _interrupted() -> NoReturn:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print("\npipelite: interrupted by Ctrl-C", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)
