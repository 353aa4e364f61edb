"""The strategy: pipeline stages on DeepSpeed's engine, in the Lightning Trainer."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.strategy.strategy import PipeLiteStrategy
    from lightning_pipelite.strategy.trained import load_trained

__all__ = ["PipeLiteStrategy", "load_trained"]
__getattr__ = lazy_names(__name__, {"PipeLiteStrategy": "strategy", "load_trained": "trained"})
