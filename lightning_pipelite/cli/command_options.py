"""Checks of some options of the commands other than fit, without slow imports."""

from __future__ import annotations

from lightning_pipelite.errors import ConfigurationError

Split = int | tuple[int, int]
"""A number of stages, or a number of stages and a number of pieces per stage."""


def read_splits(stages: str) -> list[Split]:
    """Parse ``1,2,2x4``: numbers of stages, each optionally with a number of pieces per stage.

    Raises:
        ConfigurationError: If it is malformed.
    """
    try:
        return [_read(text) for text in stages.strip("[]").split(",")]
    except ValueError:
        raise ConfigurationError(f"stages must be comma-separated integers, not {stages!r}.") from None


def check_sequences(sequences: int) -> None:
    """Refuse to show no sequences.

    Raises:
        ConfigurationError: If ``sequences`` is less than 1.
    """
    if sequences < 1:
        raise ConfigurationError(f"sequences is {sequences}: give a positive number.")


def _read(text: str) -> Split:
    stages, by, pieces = text.partition("x")
    return (int(stages), int(pieces)) if by else int(stages)
