"""The command that trains as planned."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

STRATEGY = "trainer.strategy.init_args"


def fit_command(words: Sequence[str], options: Mapping[str, object]) -> str:
    """Return a ``pipelite fit`` command with ``options`` added to the given ones, which they override.

    Args:
        words: The given options, as on the command line.
        options: Values to add, by option name.
    """
    kept: list[str] = []
    names = {f"--{name}" for name in options}
    dropping = False
    for word in words:
        if re.match("--?[A-Za-z]", word):  # also -c, but not a negative number
            dropping = word.partition("=")[0] in names
            if dropping and "=" in word:
                continue
        if not dropping:
            kept.append(word)
    added = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    lines = _lines([*kept, *added])
    return " \\\n    ".join(["pipelite fit", *lines])


def _lines(words: Sequence[str]) -> list[str]:
    """Return one line per option, with its values."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append([])
        lines[-1].append(word)
    return [shlex.join(line) for line in lines]
