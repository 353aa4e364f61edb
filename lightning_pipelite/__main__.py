"""``python -m lightning_pipelite`` is ``pipelite``."""

from lightning_pipelite.cli.main import start

start()
