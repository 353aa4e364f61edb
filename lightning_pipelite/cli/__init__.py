"""The ``pipelite`` command: its entry point, its configuration files and its error messages."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.cli.main import start

__all__ = ["start"]
__getattr__ = lazy_names(__name__, {"start": "main"})
