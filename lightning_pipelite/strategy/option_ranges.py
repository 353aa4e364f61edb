"""What the strategy's options may be, whatever the layers are; nothing long is imported for it."""

from __future__ import annotations

import re

from lightning_pipelite.errors import ConfigurationError


def check_timeout(timeout: float) -> None:
    """Refuse a time that has passed before it begins.

    Raises:
        ConfigurationError: If it is not positive.
    """
    if timeout <= 0:
        raise ConfigurationError(f"strategy: timeout must be a positive number of seconds, not {timeout}.")


def check_method(method: str) -> None:
    """Refuse a way to cut layers that there is not.

    Raises:
        ConfigurationError: If it is unknown, or its pattern is none.
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
    """Refuse numbers of pieces a stage that cannot be.

    Raises:
        ConfigurationError: If it is none, or there is a single stage.
    """
    if virtual_stages < 1:
        raise ConfigurationError(f"virtual_stages must be at least 1, not {virtual_stages}.")
    if virtual_stages > 1 and stages == 1:
        raise ConfigurationError(
            f"virtual_stages={virtual_stages} needs pipeline_stages of 2 or more; a single stage never waits for "
            "another: leave virtual_stages out."
        )
