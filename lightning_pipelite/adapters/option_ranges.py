"""The ranges of options that LoRA and Control Adapters share, and the files of their directories."""

from __future__ import annotations

from lightning_pipelite.adapters.config_file import CONFIG_FILE
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.weight_files import BASE_FILE

KNOWN_FILES = (CONFIG_FILE, "adapter_model.safetensors", BASE_FILE, "README.md")
DTYPES = ("float32", "bfloat16", "float16")


def check_options(rank: int, dropout: float, dtype: str) -> None:
    """Check the options that both kinds of adapter have.

    Raises:
        ConfigurationError: A value is out of range.
    """
    if rank < 1:
        raise ConfigurationError(f"rank is {rank}; set it to 1 or more.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigurationError(f"dropout is {dropout}; set it to at least 0 and less than 1.")
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; set it to one of {', '.join(DTYPES)}.")


def check_gamma(gamma: float) -> None:
    """Check how strongly a Control Adapter's directions are pulled back to orthogonality.

    Raises:
        ConfigurationError: The value is out of range.
    """
    if not 0.0 < gamma <= 0.5:
        raise ConfigurationError(f"gamma is {gamma}; set it to more than 0 and at most 0.5.")
