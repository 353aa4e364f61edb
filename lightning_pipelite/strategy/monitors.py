"""Which metrics callbacks may monitor; imports nothing slow."""

from __future__ import annotations

from lightning_pipelite.errors import ConfigurationError


def refuse_monitor(callback: str, monitor: str) -> None:
    """Refuse a metric that nothing will log.

    Args:
        callback: The name of the callback's class.
        monitor: The metric.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        f"{callback}: monitor is {monitor!r}, which nothing logs; set it to eval/loss, or to another metric that is "
        "logged."
    )
