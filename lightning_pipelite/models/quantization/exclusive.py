"""Rejects quantisation options that exclude each other, without slow imports."""

from lightning_pipelite.errors import ConfigurationError


def refuse_both(load_in_4bit: bool, load_in_fp8: bool) -> None:
    """Reject both options at once.

    Raises:
        ConfigurationError: Both are set.
    """
    if load_in_4bit and load_in_fp8:
        raise ConfigurationError("load_in_4bit and load_in_fp8 are mutually exclusive; set one of them to false.")
