"""Which ways to hold weights in fewer bits exclude each other; nothing long is imported for it."""

from lightning_pipelite.errors import ConfigurationError


def refuse_both(load_in_4bit: bool, load_in_fp8: bool) -> None:
    """Refuse two ways at once.

    Raises:
        ConfigurationError: If both are asked for.
    """
    if load_in_4bit and load_in_fp8:
        raise ConfigurationError("load_in_4bit and load_in_fp8 exclude each other; set one of them to false.")
