"""The door: the ``pipelite`` command, its configuration files, and what it says of mistakes."""

from lightning_pipelite.cli.main import start

__all__ = ["start"]
