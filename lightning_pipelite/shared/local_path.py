"""Directories that have to be on a local file system, or a mounted one."""

from __future__ import annotations

from typing import Any

from lightning_pipelite.errors import ConfigurationError


def refuse_remote(path: Any, what: str) -> None:
    """Refuse an address such as ``s3://bucket/checkpoints``, which would become the name of a local directory.

    Args:
        path: A path; or None, which is none.
        what: The option that gives it, for the message.

    Raises:
        ConfigurationError: If it is an address.
    """
    if path is not None and "://" in str(path):
        raise ConfigurationError(
            f"{what} is {path}, and only directories of the file system can be written and read: give one, mount the "
            "remote one (such as by s3fs or gcsfuse), or copy what was written there afterwards."
        )
