"""Directories that must be on a local or mounted file system."""

from __future__ import annotations

from typing import Any

from lightning_pipelite.errors import ConfigurationError


def refuse_remote(path: Any, what: str) -> None:
    """Refuse an address such as ``s3://bucket/checkpoints``, which would become the name of a local directory.

    Args:
        path: A path, or None for no path.
        what: The option that sets it, for the message.

    Raises:
        ConfigurationError: It is an address.
    """
    if path is not None and "://" in str(path):
        raise ConfigurationError(
            f"{what} is {path}, but only directories of the file system can be read and written: use a local one, "
            "mount the remote one (with s3fs or gcsfuse, for example), or copy the results there afterwards."
        )
