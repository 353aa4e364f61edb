"""The strategy: pipeline stages on DeepSpeed's engine, in the Lightning Trainer."""

from lightning_pipelite.strategy.strategy import PipeLiteStrategy

__all__ = ["PipeLiteStrategy"]
