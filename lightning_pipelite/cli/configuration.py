"""The configuration of a training run, as the commands other than fit receive it."""

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
        words: Arguments as for fit: ``--config FILE``, once or several times, and single options.
        parsers: The command's own parser by its name; its options are also suggested for misspelt ones.
    """

    words: tuple[str, ...]
    parsers: Mapping[str, ArgumentParser] = field(default_factory=dict)

    @classmethod
    def of(cls, given: str | Configuration) -> Configuration:
        """Wrap the name of a configuration file; return a configuration as it is."""
        return given if isinstance(given, Configuration) else cls(("--config", given))

    @property
    def files(self) -> list[str]:
        """The configuration files."""
        pairs = zip(self.words, [*self.words[1:], ""], strict=True)
        return [(*word.split("=", 1), then)[1] for word, then in pairs if word.split("=")[0] in ("-c", "--config")]

    def require_files(self) -> None:
        """Check that the configuration files exist.

        Raises:
            ConfigurationError: If one does not.
        """
        for file in self.files:
            if not Path(file).expanduser().is_file():
                raise ConfigurationError(f"there is no configuration file {file}; give the one used for pipelite fit.")

    def __str__(self) -> str:
        return " and ".join(self.files) or "the options"

    def read(self) -> dict[str, Any]:
        """Read all options by section, with defaults for those not given.

        Missing options that fit requires, but the command may not, are None.

        Raises:
            ConfigurationError: If fit would refuse an option.
        """
        from lightning_pipelite.cli.fit_options import read_options  # imports Lightning

        return read_options(self.words, self.parsers)
