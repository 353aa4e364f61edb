"""Whatever goes wrong with a record, as one sentence that says where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_pipelite.errors import ConfigurationError, first_line


def reason(error: BaseException) -> str:
    """Give the first line of what an exception says, or what it is."""
    return first_line(error)[:200]


@contextmanager
def naming(place: str, what: str) -> Iterator[None]:
    """Let whatever is raised within become an error of the record.

    Args:
        place: Where the record stands.
        what: What did not go.

    Raises:
        ConfigurationError: In place of anything but the end of the program, and of itself.
    """
    try:
        yield
    except (ConfigurationError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust is no Exception
        raise ConfigurationError(f"{place}: {what} ({reason(error)}); correct it.") from error
