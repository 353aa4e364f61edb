"""``--model_dir`` and ``--base`` as synonyms in all commands."""

from __future__ import annotations

from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.option_names import parameters_of
from lightning_pipelite.errors import ConfigurationError

_BASE = ("model_dir", "base")
"""The base model's option in all commands, and its former name in some of them."""


def with_own_names(command: str, words: list[str]) -> list[str]:
    """Return the arguments with the base model's option renamed to the one that the command itself has.

    All commands take ``--model_dir`` and ``--base``.

    Args:
        command: The subcommand of `pipelite`.
        words: The arguments after it.

    Raises:
        ConfigurationError: If both are given.
    """
    given = [number for number, word in enumerate(words) if word.partition("=")[0] in {f"--{name}" for name in _BASE}]
    if len({words[number].partition("=")[0] for number in given}) > 1:
        raise ConfigurationError("--base and --model_dir are the same option; give only one of them.")
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
