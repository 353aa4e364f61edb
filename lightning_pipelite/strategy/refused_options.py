"""Options of the Trainer that would not work as documented on a pipeline; imports nothing slow."""

from __future__ import annotations

from lightning_pipelite.errors import ConfigurationError

KEPT_PRECISION = "32-true"
"""Lightning's name for the precision that leaves dtypes alone."""


def refuse_options(*, precision: object = KEPT_PRECISION, sync_batchnorm: bool = False) -> None:
    """Refuse options that every layer would have to support.

    Args:
        precision: The Trainer's precision, by Lightning's name.
        sync_batchnorm: Whether the Trainer synchronises batch norms.

    Raises:
        ConfigurationError: If one is set.
    """
    if precision != KEPT_PRECISION:
        raise ConfigurationError(
            f"Trainer(precision={precision!r}) is not supported by PipeLiteStrategy: every layer keeps the "
            "dtype that the module gives it (for PipeLiteModule, set dtype); leave precision out."
        )
    if sync_batchnorm:
        raise ConfigurationError("Trainer(sync_batchnorm=True) is not supported by PipeLiteStrategy; leave it out.")
