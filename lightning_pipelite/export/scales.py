"""Checks the factors that adapters are merged with, without slow imports."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pipelite.errors import ConfigurationError

MAX_SCALE = 2.0


def scales_of(scale: Sequence[float] | float | None, count: int) -> list[float]:
    """Return the factor of each adapter.

    Args:
        scale: A factor for one adapter, or a list with one for each; 1 by default.
        count: Number of adapters.

    Raises:
        ConfigurationError: Their number differs from ``count``, or one is out of range.
    """
    if scale is None:
        scales = [1.0] * count
    elif isinstance(scale, (int, float)):
        scales = [float(scale)]
    else:
        scales = [float(each) for each in scale]
    if len(scales) != count:
        raise ConfigurationError(
            f"the number of scales is {len(scales)}, but that of adapters is {count}; give one scale for each adapter."
        )
    for each in scales:
        if not -MAX_SCALE < each < MAX_SCALE:
            raise ConfigurationError(f"scale must be greater than -2 and less than 2, not {each:g}.")
    return scales
