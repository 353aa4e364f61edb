"""One name for the base in all commands."""

from __future__ import annotations

from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.option_names import parameters_of
from lightning_pipelite.errors import ConfigurationError

_BASE = ("model_dir", "base")
"""What the base is called in all commands, and what it was called in some."""


def with_own_names(command: str, words: list[str]) -> list[str]:
    """Give the words of a command line with the base called as the command itself calls it.

    All commands take ``--model_dir`` and ``--base``.

    Args:
        command: of `pipelite`.
        words: behind it.

    Raises:
        ConfigurationError: if both are given.
    """
    given = [number for number, word in enumerate(words) if word.partition("=")[0] in {f"--{name}" for name in _BASE}]
    if len({words[number].partition("=")[0] for number in given}) > 1:
        raise ConfigurationError("--base is --model_dir; give one of them.")
    known = COMMANDS.get(command)
    parameters = parameters_of(known.module, known.function) if known else {}
    own = next((name for name in _BASE if name in parameters), None)
    if own is None and known is not None and not known.reads_configuration:
        return words
    stands_alone = own is not None and known is not None and own not in known.options
    made = [*words]
    for number in reversed(given):
        _, equals, value = words[number].partition("=")
        option = [f"--{own or 'model.model_dir'}{equals}{value}"]
        made[number : number + 1] = ([value] if equals else []) if stands_alone else option
    return made
