"""The former location of :mod:`lightning_pipelite.checkpoint`, kept for programs that read checkpoints."""

from lightning_pipelite.checkpoint import read_checkpoint

__all__ = ["read_checkpoint"]
