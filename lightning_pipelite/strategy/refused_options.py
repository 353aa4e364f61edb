"""Options of the Trainer that would not do on a pipeline what they say; nothing long is imported for it."""

from __future__ import annotations

from lightning_pipelite.errors import ConfigurationError

KEPT_PRECISION = "32-true"
"""As Lightning calls that which leaves dtypes alone."""


def refuse_options(*, precision: object = KEPT_PRECISION, sync_batchnorm: bool = False) -> None:
    """Refuse what every layer would have to take part in.

    Args:
        precision: The Trainer's, as it calls it.
        sync_batchnorm: Whether it synchronises batch norms.

    Raises:
        ConfigurationError: If one is asked for.
    """
    if precision != KEPT_PRECISION:
        raise ConfigurationError(
            f"Trainer(precision={precision!r}) is not supported by PipeLiteStrategy: every layer keeps the "
            "dtype that the module gives it (PipeLiteModule has dtype=); leave precision out."
        )
    if sync_batchnorm:
        raise ConfigurationError("Trainer(sync_batchnorm=True) is not supported by PipeLiteStrategy; leave it out.")
