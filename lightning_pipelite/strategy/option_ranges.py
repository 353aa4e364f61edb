"""The values that the strategy's options may have, independent of the layers; imports nothing slow."""

from __future__ import annotations

import re

from lightning_pipelite.errors import ConfigurationError


def check_timeout(timeout: float) -> None:
    """Refuse a timeout that is not positive.

    Raises:
        ConfigurationError: If it is not positive.
    """
    if timeout <= 0:
        raise ConfigurationError(f"strategy: timeout must be a positive number of seconds, not {timeout}.")


def check_method(method: str) -> None:
    """Refuse an unknown partition method.

    Raises:
        ConfigurationError: If it is unknown, or its pattern is not a regular expression.
    """
    if method in ("auto", "parameters", "uniform") or method.startswith("layers:"):
        return
    if not method.startswith("type:"):
        raise ConfigurationError(
            f"partition_method must be uniform, parameters, type:REGEX, layers:N,N,... or auto, not {method!r}."
        )
    pattern = method.removeprefix("type:")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigurationError(f"partition_method: {pattern!r} is not a regular expression ({error}).") from None


def check_virtual_stages(stages: int, virtual_stages: int) -> None:
    """Refuse an impossible number of pieces per stage.

    Raises:
        ConfigurationError: If it is less than 1, or more than 1 with a single stage.
    """
    if virtual_stages < 1:
        raise ConfigurationError(f"virtual_stages must be at least 1, not {virtual_stages}.")
    if virtual_stages > 1 and stages == 1:
        raise ConfigurationError(
            f"virtual_stages={virtual_stages} needs pipeline_stages of 2 or more; a single stage never waits for "
            "another: leave virtual_stages out."
        )
