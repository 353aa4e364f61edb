"""Turns any failure of a record into a one-sentence error that names the record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_pipelite.errors import ConfigurationError, first_line


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return first_line(error)[:200]


@contextmanager
def naming(place: str, what: str) -> Iterator[None]:
    """Convert exceptions raised inside the context into configuration errors that name the record.

    Args:
        place: Location of the record.
        what: What failed.

    Raises:
        ConfigurationError: Instead of any exception that does not end the program.
    """
    try:
        yield
    except (ConfigurationError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in tokenizers' Rust code is not an Exception
        raise ConfigurationError(f"{place}: {what} ({reason(error)}); correct it.") from error
