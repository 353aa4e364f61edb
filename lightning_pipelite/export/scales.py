"""The factors that adapters are merged with; nothing long is imported for them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pipelite.errors import ConfigurationError

MAX_SCALE = 2.0


def scales_of(scale: Sequence[float] | float | None, count: int) -> list[float]:
    """Return the factor of each adapter.

    Args:
        scale: One for one adapter, or a list of one for each; 1 by default.
        count: How many adapters there are.

    Raises:
        ConfigurationError: They are not as many, or one is out of its range.
    """
    if scale is None:
        scales = [1.0] * count
    elif isinstance(scale, (int, float)):
        scales = [float(scale)]
    else:
        scales = [float(each) for each in scale]
    if len(scales) != count:
        raise ConfigurationError(f"scale has {len(scales)} numbers for {count} adapters; give one for each.")
    for each in scales:
        if not -MAX_SCALE < each < MAX_SCALE:
            raise ConfigurationError(f"scale is {each:g}; set it to more than -2 and less than 2.")
    return scales
