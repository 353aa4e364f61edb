"""What some options of the commands beside fit may be; nothing long is imported for it."""

from __future__ import annotations

from lightning_pipelite.errors import ConfigurationError

Split = int | tuple[int, int]
"""A number of stages; or that and the number of pieces of each."""


def read_splits(stages: str) -> list[Split]:
    """Read ``1,2,2x4``: numbers of stages, or of stages and of the pieces of each.

    Raises:
        ConfigurationError: It is written in another way.
    """
    try:
        return [_read(text) for text in stages.strip("[]").split(",")]
    except ValueError:
        raise ConfigurationError(f"stages must be integers with commas between them, not {stages!r}.") from None


def check_sequences(sequences: int) -> None:
    """Refuse to show nothing.

    Raises:
        ConfigurationError: If no sequence is asked for.
    """
    if sequences < 1:
        raise ConfigurationError(f"sequences is {sequences}: give a positive number.")


def _read(text: str) -> Split:
    stages, by, pieces = text.partition("x")
    return (int(stages), int(pieces)) if by else int(stages)
