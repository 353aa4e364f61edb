"""The former place of :mod:`lightning_pipelite.checkpoint`, for programs that read checkpoints."""

from lightning_pipelite.checkpoint import read_checkpoint

__all__ = ["read_checkpoint"]
