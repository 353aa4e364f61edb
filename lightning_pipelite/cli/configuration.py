"""The configuration of a training, as the commands beside fit are given it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_pipelite.errors import ConfigurationError


@dataclass(frozen=True)
class Configuration:
    """Options of ``pipelite fit`` for a command that needs some of them, read as fit reads them.

    Attributes:
        words: As on the command line of fit: ``--config FILE``, once or several times, and single options.
        parsers: Of the command, by its name; their options are proposed for misspelt ones, too.
    """

    words: tuple[str, ...]
    parsers: Mapping[str, ArgumentParser] = field(default_factory=dict)

    @classmethod
    def of(cls, given: str | Configuration) -> Configuration:
        """Take the name of a file for the configuration that it holds."""
        return given if isinstance(given, Configuration) else cls(("--config", given))

    @property
    def files(self) -> list[str]:
        """The configuration files."""
        pairs = zip(self.words, [*self.words[1:], ""], strict=True)
        return [(*word.split("=", 1), then)[1] for word, then in pairs if word.split("=")[0] in ("-c", "--config")]

    def require_files(self) -> None:
        """Look for the configuration files.

        Raises:
            ConfigurationError: If one is not there.
        """
        for file in self.files:
            if not Path(file).expanduser().is_file():
                raise ConfigurationError(f"there is no configuration file {file}; give the one that fit is given.")

    def __str__(self) -> str:
        return " and ".join(self.files) or "the options"

    def read(self) -> dict[str, Any]:
        """Read all of it, by sections: what is given, and the defaults of the rest.

        What fit needs and the command may not is None where it is missing.

        Raises:
            ConfigurationError: If fit would not take an option.
        """
        from lightning_pipelite.cli.fit_options import read_options  # which takes Lightning along

        return read_options(self.words, self.parsers)
